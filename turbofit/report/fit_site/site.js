// The controls, the link in the fragment, and the tables that lie beside the page.
(() => {
  const choices = JSON.parse(document.getElementById('choices').textContent);
  const at = (id) => document.getElementById(id);
  const status = (text) => { at('status').textContent = text; };
  let language = /^zh/i.test(navigator.language) ? 'zh' : 'en';

  const say = (name, ...values) => {
    const text = WORDING[language][name];
    if (typeof text !== 'string') return text;
    const plural = text.split('|');
    return plural[String(values[0]) === '1' || plural.length === 1 ? 0 : 1].replace(/\{(\d)\}/g, (_, number) => values[number]);
  };

  // Each control: the entries that it offers, as [key, label].
  const short = (one) => one.title.replace(/^(NVIDIA )?(GeForce )?/, '');
  const offered = (one) => [one.name, short(one) + ', ' + bytes(one.total)];
  const card = (name) => choices.cards.find((one) => one.name === name);
  const freeOf = (one) => (size) => bytes(one.free - size);
  const chosen = (one) => (one.numbers.length ? whole(one.numbers[0]) : say('auto'));
  const images = (one) => say(one.numbers.length > 1 ? 'sized' : 'worst', ...one.numbers);
  const used = (one) => {
    const [size] = one.numbers;
    const free = freeOf(card(at('card').value || choices.cards[0].name))(size);
    return size ? say('less', free, bytes(size)) : say('all', free);
  };
  const counts = () => choices.counts.map((count) => [String(count), String(count)]);
  const keyed = (list, label) => () => list.map((one) => [one.key, label(one)]);
  const CONTROLS = {
    model: () => choices.models.map((one) => [one.name, one.title]),
    card: () => choices.cards.map(offered),
    count: counts,
    used: keyed(choices.used, used),
    images: keyed(choices.images, images),
    context: keyed(choices.contexts, chosen),
    requests: keyed(choices.concurrencies, chosen),
    beside: () => [['', say('none')], ...choices.cards.map(offered)],
    besideCount: counts,
  };
  const names = Object.keys(CONTROLS);
  const value = (name) => at(name).value;

  const fill = (name) => {
    const before = value(name);
    at(name).replaceChildren(...CONTROLS[name]().map(([key, label]) => element('option', { value: key }, label)));
    if (before) at(name).value = before;
    at(name).closest('label').hidden = at(name).options.length < 2;
  };

  // The link: every control that is not at its first entry, and the language.
  const restore = () => {
    const given = new URLSearchParams(window.location.hash.slice(1));
    const lacking = [];
    if (WORDING[given.get('lang')]) language = given.get('lang');
    for (const name of names) {
      const known = CONTROLS[name]().map(([key]) => key);
      const wanted = given.get(name);
      if (wanted !== null && !known.includes(wanted)) lacking.push(name + '=' + wanted);
      at(name).value = known.includes(wanted) ? wanted : known[0];
    }
    return lacking;
  };
  const fragment = () => {
    const kept = names.filter((name) => value(name) !== CONTROLS[name]()[0][0]);
    const always = names.slice(0, 3);
    const shown = names.filter((name) => always.includes(name) || kept.includes(name));
    return '#' + new URLSearchParams([...shown.map((name) => [name, value(name)]), ['lang', language]]);
  };
  const remember = () => {
    if (window.location.hash === fragment()) return;
    window.history.replaceState(null, '', fragment());
    // A browser ignores some of very many changes: the last one counts.
    if (window.location.hash !== fragment()) window.setTimeout(remember, 1000);
  };

  // Tables: a script each, loaded once.
  const found = {};
  const waiting = {};
  window.turbofitTable = (table) => { found[table.model + '/' + table.card] = table; };
  const tableOf = (model, name) => {
    const key = model + '/' + name;
    waiting[key] = waiting[key] || new Promise((resolve, reject) => {
      const script = element('script', { src: 'data/' + key + '.js' });
      const fail = () => { delete waiting[key]; reject(new Error(key)); };
      script.addEventListener('load', () => (found[key] ? resolve(found[key]) : fail()));
      script.addEventListener('error', fail);
      document.head.append(script);
    });
    return waiting[key];
  };
  const placeOf = (list, key) => list.findIndex((one) => (one.key || String(one)) === key);
  const answerOf = (table, count) => {
    const places = [[choices.counts, count], [choices.used, value('used')], [choices.images, value('images')],
      [choices.contexts, value('context')], [choices.concurrencies, value('requests')]];
    const place = places.reduce((sum, [list, key]) => sum * list.length + placeOf(list, key), 0);
    return table.answers[table.order[place]];
  };

  // The command that gives the answer.
  const words = () => [[choices.images, 'images'], [choices.contexts, 'context'], [choices.concurrencies, 'requests']]
    .map(([list, name]) => list[placeOf(list, value(name))].words).filter((text) => text);
  const planned = (name, count) => {
    const held = choices.used[placeOf(choices.used, value('used'))].words;
    return ['turbofit', 'plan', value('model'), '--on', count + 'x' + name + held, ...words()].join(' ');
  };
  const copied = async (button, text, said) => {
    const done = await copyText(text);
    button.focus();
    status(done ? said : say('refused'));
  };
  const command = (text) => {
    const button = element('button', { type: 'button', class: 'copy', 'aria-label': say('copyCommand') + ': ' + text }, say('copy'));
    button.addEventListener('click', () => copied(button, text, say('commandCopied')));
    return element('div', { class: 'command' }, element('pre', { tabindex: '0' }, element('code', {}, text)), button);
  };

  // Whether the figures are of the worst images, or of those of a usual size.
  const figuresOf = (one) => (one.numbers.length > 1 ? say('usualFigures', images(one)) : say('worstFigures', images(one)));

  let asked = 0;
  const show = async () => {
    remember();
    asked += 1;
    const mine = asked;
    const sides = [[value('card'), value('count')]];
    if (value('beside')) sides.push([value('beside'), value('besideCount')]);
    const shown = await Promise.all(sides.map(async ([name, count]) => {
      const title = count + ' × ' + card(name).title;
      try {
        const answer = answerOf(await tableOf(value('model'), name), count);
        const lines = [command(planned(name, count))];
        if (answer.serve) {
          const note = (text) => element('p', { class: 'dim' }, say(text));
          lines.unshift(note('here'), command(answer.serve), note('anywhere'));
        }
        return shownAnswer(answer, title, lines, figuresOf(choices.images[placeOf(choices.images, value('images'))]), say);
      } catch (error) {
        return element('article', {}, element('h2', {}, title), element('p', { class: 'bad' }, say('missing', error.message)));
      }
    }));
    if (mine !== asked) return;
    at('answers').className = sides.length > 1 ? 'two' : '';
    at('answers').replaceChildren(...shown);
    at('spoken').textContent = shown.map((one) => one.querySelector('h2').textContent + ': ' + one.querySelector('p').textContent).join(' ');
    document.body.dataset.shown = fragment();
  };

  let theme = THEMES[0];
  const paint = () => {
    document.documentElement.lang = language === 'zh' ? 'zh-CN' : 'en';
    document.title = say('title') + ' - turbofit';
    document.querySelectorAll('[data-text]').forEach((one) => { one.textContent = say(one.dataset.text); });
    const other = language === 'zh' ? 'en' : 'zh';
    at('language').textContent = other === 'zh' ? '中文' : 'English';
    at('language').lang = other;
    at('theme').textContent = say('theme', say(theme));
    names.forEach(fill);
    at('besideCount').disabled = !value('beside');
    show();
  };
  at('theme').addEventListener('click', () => {
    theme = nextTheme(theme);
    at('theme').textContent = say('theme', say(theme));
  });
  at('language').addEventListener('click', () => { language = language === 'zh' ? 'en' : 'zh'; paint(); });
  at('copy-link').addEventListener('click', (event) => copied(event.currentTarget,
    window.location.href.split('#')[0] + fragment(), say('linkCopied')));
  at('controls').addEventListener('change', () => { status(''); paint(); });
  at('controls').addEventListener('submit', (event) => event.preventDefault());
  const begin = () => {
    names.forEach(fill);
    const lacking = restore();
    paint();
    status(lacking.length ? say('lacking', lacking.join(', ')) : '');
  };
  window.addEventListener('hashchange', () => { if (window.location.hash !== fragment()) begin(); });
  begin();
})();
