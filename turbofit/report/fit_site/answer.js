// One answer of a table as elements. `say` finds a text in the page's language.
const element = (name, attributes, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined && value !== false) made.setAttribute(key, value === true ? '' : value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
};

// As turbofit/core/units.py writes them: Python rounds a half to the even digit, toFixed up.
const bytes = (size) => {
  for (const [name, unit] of [['GiB', 2 ** 30], ['MiB', 2 ** 20], ['KiB', 2 ** 10]]) {
    if (size >= unit) {
      const count = size / unit;
      const digits = count >= 100 ? 0 : 1;
      const down = digits ? count % 1 === 0.25 : count % 2 === 0.5;
      return (down ? count - 0.01 : count).toFixed(digits) + ' ' + name;
    }
  }
  return size + ' B';
};
const whole = (number) => number.toLocaleString('en-US');
const three = (number) => (number >= 999.5 ? whole(Math.round(number)) : String(Number(number.toPrecision(3))));

const KINDS = ['reserved', 'before', 'context', 'weights', 'cache', 'buffers', 'transient', 'loading', 'left', 'margin'];
const LETTERS = 'rocWKbtl.m';

const bar = (memory, say) => {
  const need = Object.values(memory.pieces).reduce((sum, size) => sum + size, 0);
  const scale = Math.max(need, memory.total);
  const present = KINDS.map((kind, i) => [kind, memory.pieces[kind], say('k')[i], LETTERS[i]]).filter((one) => one[1]);
  const label = say('inUse', memory.gpus, bytes(memory.need), bytes(memory.total),
    say(memory.loading ? 'duringLoad' : 'atWorst'));
  const stack = element('div', { class: 'stack' }, ...present.map(([kind, size, , letter]) => {
    const key = element('span', { class: 'key' }, element('span', { class: 'letter' }, letter));
    const phase = element('div', { class: 'phase k-' + kind }, key);
    phase.style.flexGrow = size;
    return phase;
  }));
  stack.style.width = (100 * need / scale) + '%';
  const drawn = element('div', { class: 'bar', role: 'img', 'aria-label': label }, stack);
  const legend = element('ul', { class: 'legend' }, ...present.map(([kind, size, name, letter]) => element('li', {},
    element('span', { class: 'swatch k-' + kind, 'aria-hidden': 'true' }, letter), ' ' + name + ' ', element('b', {}, bytes(size)))));
  if (need > memory.total) {
    const share = 100 * memory.total / scale;
    const over = element('span', { class: 'over' });
    over.style.left = share + '%';
    over.style.width = (100 - share) + '%';
    const end = element('span', { class: 'end' });
    end.style.left = share + '%';
    drawn.append(over, end);
    legend.append(element('li', {}, element('span', { class: 'swatch overs', 'aria-hidden': 'true' }, '!'),
      ' ' + say('more', bytes(need - memory.total))));
  }
  return element('div', { class: 'gpuset' }, element('p', { class: 'words' }, label), drawn, legend);
};

const tile = (label, value, text) => element('div', {}, element('span', { class: 'label' }, label),
  element('b', {}, value), element('small', {}, text));

// What is sure to an order is the nearest of 1, 3 and 10 times a power of ten.
const figure = (surety, value, say) => {
  if (!surety || !['order', 'unknown'].includes(surety.word) || value <= 0) return three(value);
  const power = 10 ** Math.floor(Math.log10(value));
  const off = (step) => Math.abs(Math.log(value / power / step));
  return say('about', three(power * [1, 3, 10].reduce((best, step) => (off(step) < off(best) ? step : best))));
};

const tiles = (answer, say) => {
  const { limits, throughput } = answer;
  const shown = [tile(say('atOnce'), whole(answer.requests_at_once), say('atOnceText'))];
  if (throughput) {
    const { surety } = throughput;
    const sure = surety && surety.median !== null ? '; ' + say('error', (100 * surety.median).toFixed(1)) : '';
    const word = surety ? '; ' + say(surety.word) : '';
    const tokens = say('speedText', figure(surety, throughput.output_tokens_per_second, say));
    const alone = figure(throughput.first_token_alone, throughput.seconds_to_first_token_alone, say);
    const among = figure(throughput.first_token, throughput.seconds_to_first_token, say);
    shown.push(tile(say('first'), alone, say('firstText', among)),
      tile(say('speed'), figure(surety, throughput.requests_per_second, say), tokens + word + sure));
  }
  shown.push(tile(say('tokens'), whole(answer.kv_tokens), say('tokensOf', say('engines', answer.replicas))),
    tile(say('contextTile'), whole(answer.context), say('contextText')));
  if (limits.vision_unit) {
    const units = limits.units_per_image;
    shown.push(tile(say('imagesTile'), whole(limits.image_tokens_per_request),
      say('imagesText', limits.images_per_request, whole(units), say(limits.vision_unit, units))));
  }
  return element('div', { class: 'tiles' }, ...shown);
};

const grid = (cls, heads, rows) => element('div', { class: 'scroll', tabindex: '0', role: 'group', 'aria-label': heads[0] },
  element('table', { class: cls },
    element('thead', {}, element('tr', {}, ...heads.map((head, i) => element('th', { scope: 'col', class: i && cls ? 'n' : null }, head)))),
    element('tbody', {}, ...rows.map((row) => element('tr', { class: row.chosen ? 'chosen' : null },
      ...row.cells.map((cell, i) => element('td', { class: i && cls ? 'n' : null }, cell)))))));

const costs = (answer, say, { surety, first_token: first } = answer.throughput || {}) => (answer.limit_costs.length ? [
  element('h3', {}, say('limits')), element('p', { class: 'dim' }, say('limitsText')),
  grid('limits', ['option', 'its', 'row_kv', 'row_once', 'row_speed', 'row_first'].map((one) => say(one)),
    answer.limit_costs.map((one) => ({
      chosen: [answer.limits.max_dynamic_patch, answer.limits.max_pixels_per_image].includes(one.limit),
      cells: [one.option, whole(one.image_tokens), whole(one.kv_tokens), whole(one.requests_at_once),
        figure(surety, one.requests_per_second, say), figure(first, one.seconds_to_first_token, say)],
    }))),
] : []);

const english = (text) => element('span', { lang: 'en' }, text);

const headline = (answer, say) => {
  if (answer.fits) {
    const held = answer.held.map(([tokens, count], i) => say(i ? 'holdsLongest' : 'holds', whole(count), whole(tokens)));
    return say('serves', whole(answer.requests_at_once)) + ' ' + held.join(say('comma')) + (held.length ? say('stop') : '');
  }
  const memory = answer.memory;
  if (!memory || memory.headroom >= memory.margin) return '';
  return say(memory.headroom < 0 ? 'short' : 'tight', memory.gpus, bytes(Math.abs(memory.headroom)),
    say(memory.loading ? 'whileLoading' : 'worstCase'), bytes(memory.margin));
};

const shownAnswer = (answer, title, commands, figures, say) => {
  const word = answer.fits ? '✔ ' + say('fits') : '✖ ' + say(answer.memory ? 'fitsNot' : 'noAnswer');
  const badge = element('strong', { class: 'badge ' + (answer.fits ? 'good' : 'bad') }, word);
  const article = element('article', { 'data-fits': String(answer.fits) },
    element('h2', {}, title), element('p', { class: 'verdict' }, badge, ' ' + headline(answer, say)));
  const said = element('p', { class: 'said' }, say('said') + ' ', element('span', { lang: 'en', class: 'sentence' }, answer.verdict));
  if (!answer.fits) article.append(said);
  article.append(element('h3', {}, say('command')), ...commands);
  if (answer.memory) article.append(bar(answer.memory, say));
  if (answer.remedies.length && !answer.fits) {
    article.append(element('h3', {}, say('remedies')), grid('', [say('change'), say('effect')],
      answer.remedies.map((one) => ({ cells: [english(one.change), english(one.effect)] }))));
  }
  if (answer.fits) {
    const engine = say('engineOf', answer.engine, answer.tp, answer.replicas);
    article.append(element('p', { class: 'dim engine' }, engine + (answer.limits.vision_unit ? '. ' + figures : '')), tiles(answer, say),
      ...costs(answer, say));
  }
  if (answer.warnings.length) {
    article.append(element('details', {}, element('summary', {}, say('warnings') + ' (' + answer.warnings.length + ')'),
      element('ul', { class: 'notes', lang: 'en' }, ...answer.warnings.map((text) => element('li', {}, text)))));
  }
  if (answer.fits) article.append(said);
  return article;
};
