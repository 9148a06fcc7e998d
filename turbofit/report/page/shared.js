'use strict';
// What every page does: light or dark, and a text to the clipboard.
const THEMES = ['system', 'light', 'dark'];

// The theme after this one: it is painted, and its name is returned.
const nextTheme = (theme) => {
  const next = THEMES[(THEMES.indexOf(theme) + 1) % THEMES.length];
  if (next === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  return next;
};

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
