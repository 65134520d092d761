// What inspect --html writes around its data: one page that needs nothing else, neither network nor library.
#pragma once

namespace gca {

inline constexpr char inspect_page_before[] = R"page(<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'">
<title>What each chunk fetched</title>
<style>
:root {
  color-scheme: light dark;
  --ground: #fcfcfa; --sheet: #fff; --ink: #1c1e21; --quiet: #5a6068; --line: #d5d8dc; --chosen: #1c1e21;
  --more: 0, 110, 190; --less: 214, 94, 0; --group0: #006ebe; --group1: #a8447f; --group2: #1e7a46; --group3: #8a6500;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14161a; --sheet: #1b1e23; --ink: #e7e9ec; --quiet: #a2a9b2; --line: #3a4048; --chosen: #fff;
    --more: 30, 110, 190; --less: 190, 80, 10;
    --group0: #58b1f5; --group1: #ee8fc6; --group2: #67cf95; --group3: #e0bb55;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 16px; max-width: 1320px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35em; line-height: 1.25; margin: 0 0 .3em; }
h2 { font-size: 1em; margin: 0 0 .4em; }
p { margin: 0 0 .7em; max-width: 105ch; }
.quiet { color: var(--quiet); }
b, h1, h2 { font-weight: 650; }
.bar { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin: 0 0 10px; }
fieldset { border: 0; margin: 0; padding: 0; display: flex; flex-wrap: wrap; gap: 2px 12px; }
legend { float: left; padding: 0; margin-right: 10px; }
button, input[type=number] { font: inherit; color: inherit; background: var(--sheet); border: 1px solid var(--line);
  border-radius: 6px; padding: 3px 9px; min-height: 32px; }
button { cursor: pointer; }
button:hover { border-color: var(--ink); }
input[type=number] { width: 6.5em; }
:focus-visible { outline: 2px solid var(--group0); outline-offset: 2px; }
.map { background: var(--sheet); border: 1px solid var(--line); border-radius: 6px; cursor: crosshair;
  touch-action: pan-y; margin: 0 0 6px; }
.map svg { display: block; width: 100%; height: 118px; }
.map text { fill: var(--quiet); font: 12px system-ui, sans-serif; }
.map path { fill: none; }
.map .here { fill: none; stroke: var(--chosen); stroke-width: 1.5; }
.map .strip { fill: rgba(128, 128, 128, .13); }
.key { display: flex; flex-wrap: wrap; gap: 2px 18px; font-size: .87em; color: var(--quiet); margin: 0 0 14px; }
.key i { display: inline-block; width: 1em; height: .8em; border-radius: 2px; margin-right: .4em; }
main { display: grid; align-items: start; grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); gap: 16px; }
main > * { min-width: 0; }
#row { list-style: none; margin: 0; padding: 0; max-height: calc(100vh - 24px); overflow-y: auto;
  background: var(--sheet); border: 1px solid var(--line); border-radius: 6px; position: relative; }
#row li { display: grid; grid-template-columns: 3.9em minmax(0, 1fr); border-left: 3px solid transparent;
  padding: 3px 8px 3px 0; cursor: pointer; content-visibility: auto; contain-intrinsic-size: auto 3.6em; }
#row li + li { border-top: 1px solid var(--line); }
#row li[aria-selected=true] { border-left-color: var(--chosen); background: rgba(128, 128, 128, .14); }
#row li.fetched { border-left-color: var(--group0); }
.n { color: var(--quiet); text-align: right; padding-right: .7em; font-size: .87em; line-height: 1.75;
  font-variant-numeric: tabular-nums; }
.text { font: 13px/1.65 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: plaintext; }
.text span { border-radius: 2px; }
.box { background: var(--sheet); border: 1px solid var(--line); border-radius: 6px; padding: 10px 12px;
  margin: 0 0 12px; }
.picks { list-style: none; margin: 0; padding: 0; }
.picks li { border-top: 1px solid var(--line); padding: 6px 0; }
.picks li:last-child { padding-bottom: 0; }
.weight { display: flex; align-items: center; gap: 10px; font-variant-numeric: tabular-nums; }
.weight div { flex: 1; height: 7px; border-radius: 4px; background: rgba(128, 128, 128, .18); overflow: hidden; }
.weight div i { display: block; height: 100%; }
.weight button { flex: 0 0 7.4em; text-align: left; }
.chips { display: flex; flex-wrap: wrap; gap: 6px; align-items: center; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { font-weight: 400; color: var(--quiet); }
th, td { text-align: right; padding: 1px 14px 1px 0; }
th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; }
dt { font-weight: 650; }
dd { margin: 0 0 .4em; max-width: 80ch; }
@media (max-width: 820px) {
  body { padding: 12px; }
  main { grid-template-columns: minmax(0, 1fr); }
  #row { max-height: max(46vh, 240px); }
  #row li { grid-template-columns: 3.2em minmax(0, 1fr); }
}
</style>
</head>
<body>
<header>
<h1 id="title">What each chunk fetched</h1>
<noscript><p>This page is drawn by its own script and by nothing from elsewhere: allow scripts.</p></noscript>
<p id="intro"></p>
</header>
<div class="bar">
<fieldset id="colours"><legend>Colour by</legend>
<label><input type="radio" name="colour" value="gain"> what retrieval gains</label>
<label><input type="radio" name="colour" value="loss"> loss</label>
</fieldset>
<label>Chunk <input id="number" type="number" min="0" step="1"></label>
<span class="chips"><button id="before">Before</button><button id="after">After</button>
<button id="next">Next best</button></span>
</div>
<div id="map" class="map" role="slider" tabindex="0" aria-label="The whole row, chunk by chunk" aria-valuemin="0">
<svg id="whole" aria-hidden="true"></svg>
</div>
<div id="lens" class="map" aria-hidden="true"><svg id="near"></svg></div>
<div class="key" id="key"></div>
<section class="box" aria-label="The chosen chunk">
<p id="said" role="status" aria-live="polite" aria-atomic="true"></p>
<div id="chosen" class="text" dir="auto" lang=""></div>
</section>
<main>
<ol id="row" role="listbox" tabindex="0" aria-label="The text, chunk by chunk; arrows choose one"></ol>
<div>
<section class="box" id="fetched" aria-label="What was fetched for it"></section>
<section class="box" id="tokens" aria-label="Its tokens"></section>
<section class="box" id="links" aria-label="Where it leads"></section>
<details class="box"><summary>What the words mean</summary><dl id="words"></dl></details>
</div>
</main>
<script type="application/json" id="data">
)page";

inline constexpr char inspect_page_after[] = R"page(</script>
<script>
'use strict';
const at = id => document.getElementById(id);
const data = JSON.parse(at('data').textContent), chunks = data.chunks, C = chunks.length;
const compares = data.picks.length > 1, fetches = data.groups > 0;
const against = {none: 'none', random: 'random ones', newest: 'the newest'}[data.picks[1]];
let chosen = data.best, colour = compares ? 'gain' : 'loss';

// ---- words and numbers ----
const make = (tag, attributes, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
};
const draw = (parent, tag, attributes) => {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  parent.append(node);
  return node;
};
const fixed = (x, digits = 2) => (x < 0 ? '\u2212' : '') + Math.abs(x).toFixed(digits);
const signed = x => (x < 0 ? '' : '+') + fixed(x);
// Line ends as a sign, and what would turn the direction of the text around it by its number.
const visible = text => text.replace(/\n/g, '\u21b5').replace(/[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g,
  c => '\u27e8U+' + c.codePointAt(0).toString(16).toUpperCase().padStart(4, '0') + '\u27e9');

// ---- the data ----
// Token n stands in chunk n / (S-1), and slot j of a chunk predicts the token after its own, across the landmark. So
// the loss of token n is that of the slot before it, and a chunk's slots predict tokens c(S-1)+1 .. (c+1)(S-1).
const R = data.slots - 1, readings = data.picks.length;
const lossOf = (n, r) => n > 0 ? chunks[Math.floor((n - 1) / R)].l[r][(n - 1) % R] : null;
const textOf = n => n < C * R ? chunks[Math.floor(n / R)].t[n % R] : '\u2026';
// What a slot's losses come to, in the colour that is on; null: no target, or no number.
const amount = (c, j) => {
  const x = chunks[c].l[0][j], y = colour === 'gain' ? chunks[c].l[1][j] : 0;
  return x === null || y === null ? null : colour === 'gain' ? y - x : x;
};
// Tokens first .. last in whole characters: one that holds a part of a character stands with the token that ends it.
const partsOf = (first, last) => {
  const parts = [];
  let open = null;
  for (let n = first; n <= last; n++) {
    open = open || {text: '', tokens: 0, loss: Array(readings).fill(null)};
    open.tokens++;
    open.text += textOf(n);
    for (let r = 0; r < readings; r++)
      if (lossOf(n, r) !== null) open.loss[r] += lossOf(n, r);
    if (!open.text) continue;
    parts.push(open);
    open = null;
  }
  if (open) parts.push({...open, text: '\u2026'});
  for (const part of parts) {
    const [x, y] = part.loss;
    part.amount = x === null || y === null ? null : colour === 'gain' ? y - x : x;
  }
  return parts;
};
const plainOf = c => visible(chunks[c].t.join(''));
// What serves chunk c, a group: picks that the chunk before it made. Whom a chunk was fetched for.
const servingOf = c => c > 0 ? chunks[c - 1].f : chunks[0].f.map(() => []);
const fetchedFor = chunks.map(() => []);
for (let c = 1; c < C; c++)
  for (const m of new Set(servingOf(c).flat().map(pick => pick[0]))) fetchedFor[m].push(c);
// Of each chunk: the sum of gains, or the mean loss; the chunks in that order; what has the full colour.
let sums, order, fullToken, fullChunk;
const measure = () => {
  const all = [];
  sums = chunks.map((_, c) => {
    const here = chunks[c].t.map((_, j) => amount(c, j)).filter(x => x !== null);
    for (const x of here) all.push(Math.abs(x));
    const sum = here.reduce((a, b) => a + b, 0);
    return colour === 'gain' ? sum : here.length ? sum / here.length : 0;
  });
  order = sums.map((_, c) => c).sort((a, b) => sums[b] - sums[a] || a - b);
  const sorted = Float64Array.from(all).sort();
  fullToken = Math.max(0.5, sorted.length ? sorted[Math.floor(0.98 * (sorted.length - 1))] : 0);
  fullChunk = sums.reduce((most, x) => Math.max(most, Math.abs(x)), 1e-9);
};
const shade = (x, full) => {
  const alpha = 0.75 * Math.min(1, Math.abs(x) / full);
  return alpha < 0.03 ? '' : `rgba(var(--${colour === 'gain' && x > 0 ? 'more' : 'less'}), ${alpha.toFixed(2)})`;
};

// ---- the text ----
const told = part => {
  if (part.loss[0] === null) return 'not predicted: nothing stands before it';
  const words = `loss ${fixed(part.loss[0])}`;
  const [x, y] = part.loss;
  return words + (compares ? `, ${fixed(y)} with ${against}: gain ${signed(y - x)}` : '') +
    (part.tokens > 1 ? ` (${part.tokens} tokens)` : '');
};
const coloured = parts => parts.map(part => {
  const span = make('span', {title: told(part)}, visible(part.text));
  if (part.amount !== null) span.style.background = shade(part.amount, fullToken);
  return span;
});
// All chunks are there as plain text, so that a browser finds words in them; those in sight are coloured.
const inSight = new Set();
const fill = c => items[c].lastChild.replaceChildren(
  ...(inSight.has(c) ? coloured(partsOf(c * R, c * R + R - 1)) : [plainOf(c)]));
const items = chunks.map((_, c) => make('li', {id: 'c' + c, role: 'option', 'aria-selected': 'false'},
  make('span', {class: 'n'}, String(c)), make('span', {class: 'text', dir: 'auto', lang: ''}, plainOf(c))));
at('row').append(...items);
const watch = new IntersectionObserver(entries => {
  for (const {target, isIntersecting} of entries) {
    const c = Number(target.id.slice(1));
    if (isIntersecting === inSight.has(c)) continue;
    if (isIntersecting) inSight.add(c); else inSight.delete(c);
    fill(c);
  }
}, {root: at('row'), rootMargin: '600px'});
items.forEach(item => watch.observe(item));
// What comes into sight may turn out higher or lower than was thought: a few times.
const bringIntoSight = (times = 4) => {
  const row = at('row'), item = items[chosen];
  const above = item.offsetTop - row.scrollTop, below = above + item.offsetHeight - row.clientHeight;
  if (above < 0 || below > 0) row.scrollTop = item.offsetTop - (row.clientHeight - item.offsetHeight) / 3;
  if (times) requestAnimationFrame(() => bringIntoSight(times - 1));
};

// ---- the map: chunks first .. last - 1 as a strip, and arcs to those that were fetched for the chosen one ----
const base = 88, thick = 14;
const drawMap = (svg, first, last) => {
  svg.replaceChildren();
  const width = svg.clientWidth || 320, count = last - first, bins = Math.min(count, Math.floor(width / 3));
  const x = c => (c - first + 0.5) * width / count;
  draw(svg, 'rect', {class: 'strip', x: 0, y: base, width, height: thick});
  for (let i = 0; i < bins; i++) {
    let strongest = 0;  // of the chunks that share a column
    for (let c = first + Math.floor(i * count / bins); c < first + Math.floor((i + 1) * count / bins); c++)
      if (Math.abs(sums[c]) > Math.abs(strongest)) strongest = sums[c];
    const gap = width / bins > 6 ? 1 : 0;
    draw(svg, 'rect', {x: i * width / bins, y: base, width: width / bins - gap, height: thick,
      style: 'fill: ' + (shade(strongest, fullChunk) || 'none')});
  }
  servingOf(chosen).forEach((picks, g) => picks.forEach(([m, w]) => {
    const from = x(chosen), to = x(m), height = 10 + 70 * Math.sqrt(Math.min(1, (from - to) / width));
    draw(svg, 'path', {d: `M${from} ${base}Q${(from + to) / 2} ${base - 2 * height} ${to} ${base}`, 'data-chunk': m,
      style: `stroke: var(--group${g % 4}); stroke-width: ${0.8 + 3.5 * w}; stroke-opacity: ${0.3 + 0.7 * w}`,
      ...(g ? {'stroke-dasharray': `${2 + 3 * g} 3`} : {})});
  }));
  const wide = Math.max(3, width / count);
  draw(svg, 'rect', {class: 'here', x: x(chosen) - wide / 2, y: base - 2, width: wide, height: thick + 4});
  const label = (at, words, anchor) => draw(svg, 'text', {x: at, y: 116, 'text-anchor': anchor}).append(words);
  const place = Math.min(Math.max(x(chosen), 14), width - 14);
  label(place, String(chosen), 'middle');
  if (place > 90) label(2, 'chunk ' + first, 'start');
  if (place < width - 60) label(width - 2, String(last - 1), 'end');
};
const drawMaps = () => {
  drawMap(at('whole'), 0, C);
  const room = Math.floor((at('map').clientWidth || 320) / 9);
  at('lens').hidden = C <= 2 * room;
  if (at('lens').hidden) return;
  const first = Math.max(0, Math.min(C - room, chosen - Math.floor(0.8 * room)));
  at('lens').dataset.first = first;
  drawMap(at('near'), first, first + room);
};

// ---- the chosen chunk ----
// A button that chooses a chunk. It goes with what it stood in, so the list has the focus then.
const goTo = (c, words) => {
  const button = make('button', {'aria-label': 'choose chunk ' + c}, words);
  button.onclick = () => {
    choose(c);
    at('row').focus({preventScroll: true});
  };
  return button;
};
const sentence = () => {
  const mean = r => {
    const all = chunks[chosen].l[r].filter(x => x !== null);
    return all.length ? fixed(all.reduce((a, b) => a + b, 0) / all.length) : 'no';
  };
  if (!compares) return `Chunk ${chosen}: a loss of ${mean(0)} nats a token.`;
  const gain = chunks[chosen].t.reduce((sum, _, j) => {
    const [x, y] = chunks[chosen].l.map(l => l[j]);
    return x === null || y === null ? sum : sum + y - x;
  }, 0);
  const groups = servingOf(chosen).map((picks, g) => picks.length === 0 ? '' :
    ` Group ${g} fetched chunk ${picks[0][0]} with weight ${picks[0][1].toFixed(3)}` +
    (picks.length > 1 ? `, and ${picks.length - 1} more.` : '.'));
  return `Chunk ${chosen} ${gain < 0 ? 'loses' : 'gains'} ${fixed(Math.abs(gain))} nats by what was fetched: ` +
    `a loss of ${mean(0)} a token, with ${against} of ${mean(1)}.` + groups.join('');
};
const showFetched = () => {
  const box = at('fetched'), groups = servingOf(chosen);
  box.hidden = !fetches;
  const heading = chosen ? `Fetched for chunk ${chosen}, by chunk ${chosen - 1}` : 'Fetched for chunk 0';
  box.replaceChildren(make('h2', {}, heading));
  if (!groups.some(picks => picks.length)) {
    box.append(make('p', {class: 'quiet'}, chosen > 1 ? 'Nothing.' : 'Nothing: no chunk was whole before ' +
      (chosen ? 'chunk 0, which asked.' : 'the row began.')));
    return;
  }
  groups.forEach((picks, g) => {
    if (groups.length > 1) box.append(make('h2', {class: 'quiet'}, 'Group ' + g));
    box.append(make('ol', {class: 'picks'}, ...picks.map(([m, w]) => {
      const meter = make('div', {'aria-hidden': 'true'},
        make('i', {style: `width: ${100 * w}%; background: var(--group${g % 4})`}));
      const weight = make('span', {'aria-label': 'weight ' + w.toFixed(3)}, w.toFixed(3));
      return make('li', {'data-group': g, 'data-chunk': m, 'data-weight': w.toFixed(3)},
        make('div', {class: 'weight'}, goTo(m, 'Chunk ' + m), meter, weight),
        make('div', {class: 'text', dir: 'auto', lang: ''}, plainOf(m)));
    })));
  });
};
const showTokens = parts => {
  const shown = parts.filter(part => part.amount !== null).sort((a, b) => b.amount - a.amount).slice(0, 6);
  const heads = compares ? ['token', 'loss', 'with ' + against, 'gain'] : ['token', 'loss'];
  const cells = part => {
    const [x, y] = part.loss, numbers = compares ? [fixed(x), fixed(y), signed(y - x)] : [fixed(x)];
    return [make('td', {class: 'text', dir: 'auto', lang: ''}, visible(part.text).replace(/ /g, '\u2423')),
      ...numbers.map(number => make('td', {}, number))];
  };
  at('tokens').replaceChildren(
    make('h2', {}, colour === 'gain' ? 'Tokens that gain most' : 'Tokens that are lost most on'),
    make('table', {}, make('thead', {}, make('tr', {}, ...heads.map(word => make('th', {scope: 'col'}, word)))),
      make('tbody', {}, ...shown.map(part => make('tr', {}, ...cells(part))))));
};
const showLinks = () => {
  at('links').hidden = !fetches;
  const line = (words, list) => make('p', {class: 'chips'}, make('span', {class: 'quiet'}, words),
    ...(list.length ? list.slice(0, 24).map(c => goTo(c, String(c))) : ['none']),
    ...(list.length > 24 ? [`and ${list.length - 24} more`] : []));
  const own = [...new Set(chunks[chosen].f.flat().map(pick => pick[0]))];
  at('links').replaceChildren(make('h2', {}, 'From here'), line(`It fetches for chunk ${chosen + 1}:`, own),
    line('It was fetched for:', fetchedFor[chosen]));
};
const choose = c => {
  c = Math.min(Math.max(Math.round(c) || 0, 0), C - 1);
  items[chosen].setAttribute('aria-selected', 'false');
  for (const item of document.querySelectorAll('#row .fetched')) item.classList.remove('fetched');
  chosen = c;
  items[c].setAttribute('aria-selected', 'true');
  for (const [m] of servingOf(c).flat()) items[m].classList.add('fetched');
  at('row').setAttribute('aria-activedescendant', 'c' + c);
  at('number').value = c;
  at('map').setAttribute('aria-valuenow', c);
  at('map').setAttribute('aria-valuetext', sentence());
  at('said').textContent = sentence();
  const parts = partsOf(c * R + 1, (c + 1) * R);
  const first = make('span', {class: 'quiet', title: 'the chunk before predicts it'}, visible(textOf(c * R)));
  at('chosen').replaceChildren(first, ...coloured(parts));
  showFetched();
  showTokens(parts);
  showLinks();
  drawMaps();
  bringIntoSight();
  history.replaceState(null, '', `#chunk=${c}` + (compares && colour === 'loss' ? '&colour=loss' : ''));
};
const recolour = () => {
  measure();
  at('next').textContent = colour === 'gain' ? 'Next best' : 'Next worst';
  for (const c of inSight) fill(c);
  const swatch = (x, words) => make('span', {}, make('i', {style: 'background: ' + shade(x, 1)}), words);
  const most = fixed(fullToken, 1);
  at('key').replaceChildren(...(colour === 'gain' ?
    [swatch(1, `guessed better with what was fetched (full: ${most} nats)`), swatch(-1, 'guessed worse')] :
    [swatch(1, `not foreseen (full: a loss of ${most} nats)`)]),
    ...(fetches ? ['arcs: what was fetched for the chosen chunk, as thick as its weight' +
      (data.groups > 1 ? '; dashed: of groups above the first' : '')] : []));
  choose(chosen);
};

// ---- what a reader does ----
const keys = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1, PageUp: -10, PageDown: 10,
  Home: -Infinity, End: Infinity};
for (const id of ['map', 'row'])
  at(id).addEventListener('keydown', event => {
    const by = keys[event.key];
    if (by === undefined || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    choose(Math.abs(by) === Infinity ? (by < 0 ? 0 : C - 1) : chosen + by);
  });
at('row').addEventListener('click', event => {
  const item = event.target.closest('li');
  if (item) choose(Number(item.id.slice(1)));
});
const pointed = (id, first, count) => at(id).addEventListener('pointerdown', event => {
  const box = at(id).getBoundingClientRect();
  choose(Math.floor(first() + (event.clientX - box.left) / box.width * count()));
});
pointed('map', () => 0, () => C);
pointed('lens', () => Number(at('lens').dataset.first), () => Math.floor(at('map').clientWidth / 9));
at('number').addEventListener('change', () => choose(Number(at('number').value)));
at('before').onclick = () => choose(chosen - 1);
at('after').onclick = () => choose(chosen + 1);
at('next').onclick = () => choose(order[(order.indexOf(chosen) + 1) % C]);
for (const radio of document.querySelectorAll('[name=colour]')) {
  radio.checked = radio.value === colour;
  radio.onchange = () => { colour = radio.value; recolour(); };
}
const asAddressed = () => {
  const wanted = new URLSearchParams(location.hash.slice(1));
  if (compares) colour = wanted.get('colour') === 'loss' ? 'loss' : 'gain';
  for (const radio of document.querySelectorAll('[name=colour]')) radio.checked = radio.value === colour;
  if (wanted.has('chunk')) chosen = Math.min(Math.max(Math.round(wanted.get('chunk')) || 0, 0), C - 1);
  recolour();
};
addEventListener('hashchange', asAddressed);
new ResizeObserver(drawMaps).observe(at('map'));

// ---- what one sees ----
const name = data.text, model = data.checkpoint.split('/').slice(-2).join('/');
at('colours').hidden = !compares;
at('number').max = C - 1;
at('map').setAttribute('aria-valuemax', C - 1);
at('title').textContent = document.title = fetches ? `What each chunk of ${name} fetched` :
  `What was foreseen of ${name}`;
const mean = r => `${fixed(data.loss[r], 4)} nats a token`;
const how = data.picks[0] === 'learned' ? 'the chunks that its retriever fetched' : `${data.picks[0]} chunks`;
at('intro').textContent = `Here ${model} read ${name}, ${C} chunks of ${data.slots} slots` + (compares ?
  `, twice: with ${how}, a loss of ${mean(0)}, and with ${against}, ${mean(1)}. What fetching helped to guess is ` +
  'blue, what it disturbed orange, and arcs lead to the chunks that were fetched for the chosen one. ' :
  `. It fetches nothing: a loss of ${mean(0)}. What it did not foresee is orange. `) +
  `The page opens with the chunk that ${compares ? 'gains' : 'loses'} most, ${data.best}: choose any other in the ` +
  'map, in the text, or with the arrow keys.';
const words = {
  chunk: `${R} tokens in a row, and a landmark after them, which asks for past chunks and answers when others ask.`,
  fetched: 'When a chunk has been read whole, each group picks the past chunks of highest score. They serve the next '
    + 'chunk: what was fetched for a chunk was asked for by the one before it.',
  weight: 'The softmax over the scores of what was picked: how much of each comes in.',
  loss: 'Minus the logarithm of the probability that the model gave to the token that came: 0 if it was sure of it. '
    + 'In nats: one nat more is a probability e = 2.718 times less.',
  gain: 'The loss of the second reading less that of the first. A chunk\u2019s sum is over what its slots predict: its '
    + 'tokens but the first, and the first of the next chunk.',
};
for (const [word, meaning] of Object.entries(words))
  if (fetches || word === 'loss') at('words').append(make('dt', {}, word), make('dd', {}, meaning));
asAddressed();
</script>
</body>
</html>
)page";

}  // namespace gca
