'use strict';
// The clipboard where the browser lends it, else a selection; whether the text was copied.
const copyText = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch (refused) {
    const area = document.createElement('textarea');
    area.value = text;
    area.className = 'aside';
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    return done;
  }
};
(() => {
  const all = (query, from) => Array.from((from || document).querySelectorAll(query));
  const status = document.getElementById('status');
  const data = document.getElementById('turbofit-json').textContent;

  // Light, dark, or as the system says.
  const theme = document.getElementById('theme');
  const themes = ['system', 'light', 'dark'];
  let chosen = themes[0];
  theme.hidden = false;
  theme.addEventListener('click', () => {
    chosen = themes[(themes.indexOf(chosen) + 1) % themes.length];
    if (chosen === 'system') delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = chosen;
    theme.textContent = 'Theme: ' + chosen;
  });

  const print = document.getElementById('print');
  print.hidden = false;
  print.addEventListener('click', () => window.print());

  async function copied(button, text) {
    const done = await copyText(text);
    const before = button.dataset.text || button.textContent;
    button.dataset.text = before;
    button.textContent = done ? 'Copied' : 'Press Ctrl+C';
    status.textContent = done ? 'Copied to the clipboard.' : 'The browser refused the clipboard.';
    button.focus();
    window.setTimeout(() => { button.textContent = before; }, 2000);
  }
  all('.command').forEach((one) => {
    const button = one.querySelector('.copy');
    button.hidden = false;
    button.addEventListener('click', () => copied(button, one.querySelector('code').textContent));
  });
  const pretty = () => JSON.stringify(JSON.parse(data), null, 2) + '\n';
  document.getElementById('json-buttons').hidden = false;
  document.getElementById('copy-json').addEventListener('click', (event) => {
    copied(event.currentTarget, pretty());
  });
  document.getElementById('save-json').addEventListener('click', () => {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([pretty()], { type: 'application/json' }));
    link.download = 'turbofit.json';
    link.click();
    URL.revokeObjectURL(link.href);
    status.textContent = 'Saved as turbofit.json.';
  });

  // Bars: the pointer or the arrow keys choose a part, and the line below says what it is.
  all('.gpuset').forEach((set) => {
    const readout = set.querySelector('.readout');
    const idle = readout.textContent;
    const says = all('[data-say]', set).map((part) => part.dataset.say);
    all('.bar', set).forEach((bar) => {
      const parts = all('.phase i', bar);
      let at = -1;
      const show = (number) => {
        parts.forEach((part) => part.classList.remove('on'));
        at = number;
        if (at >= 0) parts[at].classList.add('on');
        const gpu = bar.closest('.row').querySelector('.gpu').textContent;
        readout.textContent = at < 0 ? idle : gpu + ': ' + says[at];
      };
      parts.forEach((part, number) => part.addEventListener('pointerenter', () => show(number)));
      bar.addEventListener('pointerleave', () => show(-1));
      bar.addEventListener('blur', () => show(-1));
      bar.addEventListener('keydown', (event) => {
        const last = parts.length - 1;
        const to = {
          ArrowRight: Math.min(at + 1, last), ArrowLeft: Math.max(at - 1, 0), Home: 0, End: last,
          Escape: -1,
        }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        show(to);
      });
    });
  });
})();
