// The page of `ernie-jax serve`. Its address is its state: ?q= the query, &row= the passage that the panel shows.
// Whatever comes from queries or passages enters the document as text (`make` knows no other way in).

const RANKINGS = [
  { how: "bm25", name: "BM25", says: "words that both have, rare ones more" },
  { how: "dual", name: "Dual-encoder", says: "one vector per text" },
  { how: "late", name: "Late interaction", says: "one vector per token, MaxSim" },
  { how: "cross", name: "Cross-encoder", says: "query and passage read together" },
];
const SHOWN = 10; // hits of a ranking
const DEEP = 100; // hits of the dual-encoder that are asked for: the others re-rank them, and show how they moved
const COMMON = new Set(
  "a an and are as at be by do does for from how i in is it its of on or that the this to was what when where which who why will with".split(" "),
);

const $ = (id) => document.getElementById(id);
const still = matchMedia("(prefers-reduced-motion: reduce)");

/** An element: its class, its attributes, and its children, of which strings become text. */
function make(tag, settings = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(settings)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, value);
    else if (value !== null && value !== false) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}

function icon(path) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 16 16");
  svg.setAttribute("aria-hidden", "true");
  svg.append(document.createElementNS(svg.namespaceURI, "path"));
  svg.firstChild.setAttribute("d", path);
  return svg;
}

async function ask(path, parameters, signal) {
  let answer;
  try {
    answer = await fetch(`${path}?${new URLSearchParams(parameters)}`, { signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("The service does not answer. Is it still running?");
  }
  const found = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(found.error || `The service answers ${answer.status}.`);
  return found;
}

const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?]$/.test(text) ? "" : ".");
const took = (seconds) => (seconds < 0.9995 ? `${Math.max(1, Math.round(seconds * 1000))} ms` : `${seconds.toFixed(1)} s`);
const link = (query, row) => `/?${new URLSearchParams(row === undefined ? { q: query } : { q: query, row })}`;

// Words and snippets

/** Spans of a text's words that are words of the query, or begin as one does: [begin, end]. */
function common(text, query) {
  const words = (query.toLowerCase().match(/[\p{L}\p{N}]+/gu) || []).filter((word) => !COMMON.has(word));
  const alike = (word, other) =>
    word === other || (Math.min(word.length, other.length) >= 4 && (word.startsWith(other) || other.startsWith(word)));
  const spans = [];
  for (const match of text.matchAll(/[\p{L}\p{N}]+/gu)) {
    const word = match[0].toLowerCase();
    if (words.some((other) => alike(word, other))) spans.push([match.index, match.index + match[0].length]);
    // Chinese and Japanese write no spaces: there a run of characters is looked through.
    else if (/[\u3040-\u30ff\u3400-\u9fff]/.test(word)) {
      for (const other of words) {
        const at = word.indexOf(other);
        if (at >= 0) spans.push([match.index + at, match.index + at + other.length]);
      }
    }
  }
  return spans;
}

/** A text as nodes, the spans marked; names like numpy.linalg.lstsq may break after a dot. */
function marked(text, spans) {
  const joints = (part) =>
    part.split(/(?<=[._/:])(?=\p{L})|(?<=\p{Ll})(?=\p{Lu})/u).flatMap((piece, i) => (i ? [make("wbr"), piece] : [piece]));
  const nodes = [];
  let end = 0;
  for (const [from, to] of spans) {
    if (from < end) continue;
    nodes.push(...joints(text.slice(end, from)), from > end ? make("wbr") : "", make("mark", {}, ...joints(text.slice(from, to))));
    end = to;
  }
  return [...nodes, ...joints(text.slice(end))];
}

function snippet(text, query) {
  const flat = text.replace(/\s+/g, " ").trim();
  const first = common(flat, query)[0]?.[0] ?? 0;
  const begin = first > 140 ? flat.lastIndexOf(" ", first - 50) + 1 : 0;
  const cut = (begin ? "… " : "") + flat.slice(begin, begin + 420);
  return marked(cut, common(cut, query));
}

// Rankings

let working = new AbortController(); // the requests of the query that is shown
let shown = null; // that query
const columns = new Map(); // how -> {ranking, node, body, time, hits}

function frame() {
  for (const ranking of RANKINGS) {
    const time = make("span", { class: "took" });
    const body = make("div");
    const title = `of-${ranking.how}`;
    const node = make(
      "section",
      { class: "column", id: ranking.how, "aria-labelledby": title },
      make("header", {}, make("h2", { id: title }, ranking.name), time, make("p", {}, ranking.says)),
      body,
    );
    const tab = make("button", { type: "button", onclick: () => {
      node.scrollIntoView({ behavior: still.matches ? "auto" : "smooth", block: "nearest", inline: "start" });
    } }, ranking.name);
    $("columns").append(node);
    $("tabs").append(tab);
    columns.set(ranking.how, { ranking, node, tab, body, time, hits: null });
  }
  $("columns").addEventListener("scroll", current, { passive: true });
  new ResizeObserver(current).observe($("columns"));
}

/** Marks the tab of the column that stands first in view; at the right end, of the last. */
function current() {
  const strip = $("columns");
  const all = [...columns.values()];
  const atEnd = strip.scrollLeft > 0 && strip.scrollLeft + strip.clientWidth >= strip.scrollWidth - 2;
  const near = (column) => Math.abs(column.node.getBoundingClientRect().left - strip.getBoundingClientRect().left);
  const first = atEnd ? all.at(-1) : all.reduce((best, column) => (near(column) < near(best) ? column : best));
  for (const column of all) {
    if (column === first && column.tab.getAttribute("aria-current") !== "true") {
      column.tab.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
    column.tab.setAttribute("aria-current", column === first);
  }
}

function search(query) {
  working.abort();
  working = new AbortController();
  shown = query;
  for (const column of columns.values()) rank(column, query, working.signal);
}

async function rank(column, query, signal) {
  const { body, time, ranking } = column;
  column.hits = null;
  time.className = "took busy";
  time.textContent = "";
  body.setAttribute("aria-busy", "true");
  const ghosts = Array.from({ length: 5 }, () => make("li", { class: "ghost" }, make("i"), make("i"), make("i")));
  body.replaceChildren(make("ol", { class: "hits", "aria-hidden": "true" }, ...ghosts));
  try {
    const k = ranking.how === "dual" ? DEEP : SHOWN;
    const found = await ask("/api/search", { q: query, how: ranking.how, k }, signal);
    column.hits = found.hits;
    time.textContent = took(found.seconds);
    body.replaceChildren(found.hits.length ? list(column, query) : nothing(ranking));
    moves();
    if (open !== null) chips();
    redraw?.();
  } catch (error) {
    if (signal.aborted) return;
    const again = make("button", { class: "again", type: "button", onclick: () => rank(column, query, signal) }, "Try again");
    body.replaceChildren(make("div", { class: "note bad", role: "alert" }, make("p", {}, sentence(error.message)), again));
  }
  time.className = "took";
  body.removeAttribute("aria-busy");
}

function nothing(ranking) {
  const why = ranking.how === "bm25" ? "No passage has a word of this query." : "Nothing found.";
  return make("div", { class: "note" }, make("p", {}, why));
}

function list(column, query) {
  const hits = column.hits.slice(0, SHOWN);
  const top = Math.max(...hits.map((hit) => Math.abs(hit.score)));
  const digits = top >= 100 ? 1 : top >= 10 ? 2 : 3;
  const cards = hits.map((hit, i) => {
    const card = make(
      "a",
      { class: hit.title ? "hit" : "hit untitled", href: link(query, hit.row), "data-row": hit.row },
      make("span", { class: "rank" }, String(i + 1)),
      hit.title ? make("h3", { dir: "auto" }, ...marked(hit.title, common(hit.title, query))) : null,
      make("span", { class: "score", title: `score ${hit.score}` }, number(hit.score, digits)),
      make("span", { class: "move" }),
      make("p", { class: "snippet", dir: "auto" }, ...snippet(hit.text, query)),
    );
    card.addEventListener("click", (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return;
      event.preventDefault();
      go(link(query, hit.row));
    });
    for (const [event, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) {
      card.addEventListener(event, () => same(hit.row, on));
    }
    return make("li", {}, card);
  });
  return make("ol", { class: "hits" }, ...cards);
}

/** A passage under the pointer, or focused, is marked wherever it stands. */
function same(row, on) {
  for (const card of document.querySelectorAll(".hit")) card.classList.toggle("same", on && card.dataset.row === String(row));
}

const place = (how, row) => (columns.get(how).hits ?? []).findIndex((hit) => hit.row === row) + 1; // 0: not there

/** How far each passage stands above or below its place in the dual-encoder's ranking. */
function moves() {
  if (!columns.get("dual").hits) return;
  for (const { ranking, body } of columns.values()) {
    if (ranking.how === "dual") continue;
    for (const [i, card] of [...body.querySelectorAll(".hit")].entries()) {
      const move = card.querySelector(".move");
      const from = place("dual", Number(card.dataset.row));
      const up = from - i - 1;
      move.className = `move ${!from || up > 0 ? "up" : up < 0 ? "down" : ""}`;
      move.textContent = !from ? "new" : up > 0 ? `↑${up}` : up < 0 ? `↓${-up}` : "=";
      move.title = from ? `the dual-encoder has it at ${from}` : `not among the dual-encoder's first ${DEEP}`;
    }
  }
}

// The panel

let open = null; // row of the passage that it shows
let matching = new AbortController();
let redraw = null; // for a passage whose text no ranking has brought yet

function passage(row) {
  for (const { hits } of columns.values()) {
    const hit = hits?.find((one) => one.row === row);
    if (hit) return hit;
  }
  return null;
}

function chips() {
  const places = RANKINGS.filter(({ how }) => columns.get(how).hits).map(({ how, name }) => {
    const at = place(how, open);
    return make("li", {}, name, make("b", {}, at ? `#${at}` : "–"));
  });
  $("chips")?.replaceChildren(...places);
  const hit = passage(open);
  if (hit && $("panel-title")) $("panel-title").replaceChildren(...marked(hit.title || `Passage ${hit.id}`, []));
}

async function show(query, row) {
  matching.abort();
  matching = new AbortController();
  const { signal } = matching;
  open = row;
  redraw = null;
  const close = make("button", { class: "close", type: "button", "aria-label": "Close", onclick: leave }, icon("M3 3l10 10M13 3L3 13"));
  const body = make("div", { class: "parts", "aria-busy": "true" }, make("div", { class: "part ghost" }, make("i"), make("i"), make("i")));
  $("panel").replaceChildren(
    make(
      "div",
      { class: "top" },
      make(
        "div",
        {},
        make("h2", { id: "panel-title", dir: "auto" }, `Passage ${row}`),
        make("p", {}, "for ", make("b", { dir: "auto" }, query)),
        make("ul", { class: "chips", id: "chips", "aria-label": "Place in each ranking" }),
      ),
      close,
    ),
    body,
  );
  chips();
  if (!$("panel").open) $("panel").showModal();
  $("panel").scrollTop = 0;
  try {
    const found = await ask("/api/match", { q: query, row }, signal);
    redraw = () => {
      const hit = passage(row);
      body.replaceChildren(...parts(found, hit));
      new Bands(found, body.querySelector(".bands"));
      if (hit) redraw = null;
    };
    redraw();
  } catch (error) {
    if (signal.aborted) return;
    const again = make("button", { class: "again", type: "button", onclick: () => show(query, row) }, "Try again");
    body.replaceChildren(make("div", { class: "part" }, make("div", { class: "note bad", role: "alert" }, make("p", {}, sentence(error.message)), again)));
  }
  body.removeAttribute("aria-busy");
}

/** The panel's parts: the text with its tokens tinted, the heat map, and the sum that MaxSim is. */
function parts(found, hit) {
  const best = found.similarity.map((row) => row.indexOf(Math.max(...row)));
  const values = found.similarity.flat();
  const low = values.reduce((a, b) => Math.min(a, b), Infinity);
  const high = values.reduce((a, b) => Math.max(a, b), -Infinity);
  found.best = best;
  found.share = (value) => (high > low ? (value - low) / (high - low) : 0).toFixed(3);

  const columnBest = found.passage.map((_, j) => found.similarity.reduce((most, row, i) => (row[j] > found.similarity[most][j] ? i : most), 0));
  const text = hit ? tinted(hit, found) : bare(found);
  const cut = text.dataset.cut === "true";
  const rest = cut ? make("p", { class: "says after" }, "Grey: beyond what the model reads of a passage.") : null;
  const choose = (i) => {
    for (const node of text.querySelectorAll(".token")) {
      const j = Number(node.dataset.token);
      const from = i < 0 ? columnBest[j] : i;
      // Squared: what matters little would otherwise drown what matters.
      node.style.setProperty("--t", found.share(found.similarity[from][j]) ** 2);
      node.dataset.tip = pair(found, from, j);
    }
    for (const button of chooser.querySelectorAll("button")) button.setAttribute("aria-pressed", Number(button.value) === i);
  };
  const button = (i, name, kind) => make("button", { type: "button", value: i, class: kind, onclick: () => choose(i) }, name);
  const chooser = make(
    "ul",
    { class: "tokens", "aria-label": "Tint by" },
    make("li", {}, button(-1, "all tokens", "all")),
    ...found.query.map((token, i) => make("li", {}, button(i, token, special(token)))),
  );
  choose(-1);

  const sums = found.query.map((token, i) => {
    const value = found.similarity[i][best[i]];
    return make(
      "tr",
      {},
      make("th", { scope: "row", class: `word ${special(token)}` }, token),
      make("td", { class: "word" }, found.passage[best[i]]),
      make("td", { class: "bar" }, make("i", { "--t": Math.max(0, value) })),
      make("td", { class: "number" }, number(value, 3)),
    );
  });
  const part = (title, says, ...children) =>
    make("section", { class: "part" }, make("h3", {}, title), make("p", { class: "says" }, says), ...children.filter(Boolean));
  const names = ["Query token", "Best match", "", "Cosine"];
  const head = names.map((name, i) => make("th", { scope: "col", class: i === 3 ? "number" : null }, name));
  const total = [make("th", { scope: "row", colspan: 3 }, "MaxSim"), make("td", { class: "number" }, number(found.score, 3))];
  return [
    make(
      "div",
      { class: "pair" },
      part("The passage", "Tinted by the similarity of each token to the query token that it matches best, or to one of them:", chooser, text, rest),
      part(
        "The sum",
        "What each query token adds to the late-interaction score.",
        make(
          "table",
          { class: "sums" },
          make("thead", {}, make("tr", {}, ...head)),
          make("tbody", {}, ...sums),
          make("tfoot", {}, make("tr", {}, ...total)),
        ),
      ),
    ),
    part(
      "Token by token",
      "Query tokens down, passage tokens across: the cosine of their vectors. MaxSim adds up the best of each row.",
      make(
        "div",
        { class: "scale" },
        number(low, 2),
        make("i"),
        number(high, 2),
        make("span", {}, make("i", { class: "ring" }), " best of the row"),
      ),
      make("div", { class: "bands" }),
    ),
  ];
}

const number = (value, digits) => value.toFixed(digits).replace("-", "−");
const pair = (found, i, j) => `“${found.query[i]}” and “${found.passage[j]}”: ${number(found.similarity[i][j], 3)}`;
const special = (token) => (/^\[[A-Za-z0-9]+\]$/.test(token) ? "special" : "");

/** The tokens themselves, where the text is not at hand: no ranking shows the passage. */
function bare(found) {
  const nodes = found.passage.flatMap((token, j) => {
    const joined = token.startsWith("##");
    return [joined || !j ? "" : " ", make("span", { class: "token", "data-token": j }, joined ? token.slice(2) : token)];
  });
  return make("p", { class: "passage", dir: "auto" }, ...nodes);
}

/** The whole text, each token at its place in it: tokens have lost case, accents and spaces. */
function tinted(hit, found) {
  const source = hit.title ? `${hit.title}\n${hit.text}` : hit.text;
  const edge = hit.title ? hit.title.length : -1;
  const spans = align(source, edge, found.passage);
  const node = make("p", { class: "passage", dir: "auto" });
  const part = (from, to, span) => {
    if (from >= to) return;
    if (from < edge && to > edge) return part(from, edge, span), part(edge, to, span);
    const settings = span ? { class: "token", "data-token": span.token } : {};
    const kind = from < edge ? "title" : span || from < last ? "" : "unread";
    if (kind) settings.class = `${settings.class ?? ""} ${kind}`.trim();
    node.append(make("span", settings, source.slice(from, to)));
  };
  const last = spans.at(-1)?.to ?? 0;
  let end = 0;
  for (const span of spans) {
    part(end, span.from, null);
    part(span.from, span.to, span);
    end = span.to;
  }
  part(end, source.length, null);
  node.dataset.cut = Boolean(source.slice(last).trim());
  return node;
}

/** Where WordPiece tokens stand in the text that they were made of: [{from, to, token}], in order. */
function align(source, edge, tokens) {
  const fold = (text) => text.normalize("NFD").replace(/\p{M}/gu, "").toLowerCase();
  let folded = "";
  const origin = []; // of each folded character: where the character that it came of begins
  let at = 0;
  for (const character of source) {
    const plain = fold(character);
    for (let i = 0; i < plain.length; i++) origin.push(at);
    folded += plain;
    at += character.length;
  }
  origin.push(source.length);
  const spans = [];
  let cursor = 0;
  for (const [token, raw] of tokens.entries()) {
    while (/\s/.test(folded[cursor] ?? "")) cursor++;
    if (raw === "[UNK]") {
      const word = /^([\p{L}\p{N}]+|.)/u.exec(folded.slice(cursor, cursor + 200));
      if (!word) continue;
      spans.push({ from: origin[cursor], to: origin[cursor + word[0].length], token });
      cursor += word[0].length;
      continue;
    }
    if (special(raw)) continue;
    const piece = fold(raw.replace(/^##/, ""));
    let found = folded.startsWith(piece, cursor) ? cursor : -1;
    const between = raw === ":" && edge >= 0 && origin[cursor] === edge + 1; // the template's, between title and text
    if (found < 0 && !between) found = folded.slice(cursor, cursor + 40 + piece.length).indexOf(piece) + (cursor || 0);
    if (found < cursor) continue;
    spans.push({ from: origin[found], to: origin[found + piece.length], token });
    cursor = found + piece.length;
  }
  return spans;
}

/** The heat map: one table, or several below each other where the passage's tokens are more than fit. */
class Bands {
  constructor(found, place) {
    this.found = found;
    this.place = place;
    this.draw();
    new ResizeObserver(() => this.draw()).observe(place);
    place.addEventListener("pointerover", (event) => this.point(event.target.closest("td")));
    place.addEventListener("pointerleave", () => this.point(null));
    place.addEventListener("focusin", (event) => this.point(event.target.closest("td")));
    place.addEventListener("focusout", () => this.point(null));
    place.addEventListener("keydown", (event) => this.step(event));
  }

  draw() {
    const count = this.found.passage.length;
    const room = this.place.clientWidth - (innerWidth <= 600 ? 74 : 98) - 2;
    const bands = Math.ceil(count / Math.max(8, Math.floor(room / 23)));
    const each = Math.ceil(count / bands); // of equal length: no band with a cell or two
    this.place.style.setProperty("--side", `${Math.min(32, Math.max(21, Math.floor(room / each) - 2))}px`);
    if (each === this.each) return;
    this.each = each;
    this.place.replaceChildren(...Array.from({ length: bands }, (_, b) => this.band(b * each, (b + 1) * each, b + 1, bands)));
    this.cell(0, 0)?.setAttribute("tabindex", "0");
  }

  band(from, to, number, count) {
    const { query, passage, similarity, best, share } = this.found;
    const head = passage.slice(from, to).map((token, j) =>
      make("th", { scope: "col", "data-j": from + j, title: token, class: special(token) }, make("span", {}, token)));
    const rows = query.map((token, i) =>
      make(
        "tr",
        {},
        make("th", { scope: "row", "data-i": i, title: token, class: special(token) }, token),
        ...similarity[i].slice(from, to).map((value, j) =>
          make("td", {
            "--t": share(value),
            class: best[i] === from + j ? "best" : null,
            "data-i": i,
            "data-j": from + j,
            "aria-label": `${token}, ${passage[from + j]}: ${value.toFixed(3)}`,
            tabindex: -1,
          })),
      ));
    const label = `Similarities of query and passage tokens${count > 1 ? `, part ${number} of ${count}` : ""}`;
    return make("table", { class: "heat", "aria-label": label }, make("thead", {}, make("tr", {}, make("td", { class: "corner" }), ...head)), make("tbody", {}, ...rows));
  }

  cell(i, j) {
    return this.place.querySelector(`tbody td[data-i="${i}"][data-j="${j}"]`);
  }

  point(cell) {
    for (const one of this.place.querySelectorAll("th.on")) one.classList.remove("on");
    if (!cell?.dataset.i) return tip(null);
    const { i, j } = cell.dataset;
    for (const one of this.place.querySelectorAll(`th[data-i="${i}"], th[data-j="${j}"]`)) one.classList.add("on");
    tip(cell, pair(this.found, i, j));
  }

  step(event) {
    const by = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const cell = event.target.closest("td");
    if (!by || !cell) return;
    event.preventDefault();
    const next = this.cell(Number(cell.dataset.i) + by[0], Number(cell.dataset.j) + by[1]);
    if (!next) return;
    cell.setAttribute("tabindex", "-1");
    next.setAttribute("tabindex", "0");
    next.focus();
  }
}

function tip(node, text) {
  const box = $("tip");
  box.hidden = !node;
  if (!node) return;
  $("panel").append(box); // above everything else there is only the dialog
  box.textContent = text;
  const at = node.getBoundingClientRect();
  const size = box.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left + at.width / 2 - size.width / 2), innerWidth - size.width - 8);
  const top = at.top - size.height - 8;
  box.style.transform = `translate(${Math.round(left)}px, ${Math.round(top < 8 ? at.bottom + 8 : top)}px)`;
}

// The address, and what it shows

function go(url) {
  if (url !== location.pathname + location.search) history.pushState({ own: true }, "", url);
  render();
}

/** Closes the panel: a step back where opening it was a step here, and else the query's own address. */
function leave() {
  if (history.state?.own) return history.back();
  history.replaceState(null, "", link(shown));
  render();
}

function render() {
  const asked = new URLSearchParams(location.search);
  const query = (asked.get("q") ?? "").trim();
  const row = /^\d+$/.test(asked.get("row") ?? "") ? Number(asked.get("row")) : null;
  document.title = query ? `${query} – ernie-jax` : "ernie-jax";
  document.body.classList.toggle("idle", !query);
  $("intro").hidden = Boolean(query);
  $("results").hidden = !query;
  if (query !== shown) {
    $("query").value = query;
    scrollTo(0, 0);
    if (query) search(query);
    else working.abort();
    shown = query;
  }
  if (query && row !== null) {
    if (row !== open || !$("panel").open) show(query, row);
  } else {
    matching.abort();
    open = redraw = null;
    tip(null);
    if ($("panel").open) $("panel").close();
  }
}

async function introduce() {
  const about = await ask("/api/about", {});
  const said = [["Passages", about.passages.toLocaleString("en")], ["Data", about.data], ["Model", about.model], ["Corpus", about.corpus]];
  for (const [name, value] of said) {
    if (value === undefined) continue;
    const code = /^[0-9a-f]{12,}$/.test(value);
    $("about").append(make("span", {}, name, make("b", { class: code ? "code" : null, title: value }, code ? value.slice(0, 12) : String(value))));
  }
  $("extent").textContent = `${about.passages.toLocaleString("en")} passages${about.data ? ` of ${about.data}` : ""}`;
  const examples = about.examples ?? [];
  if (examples.length) $("query").placeholder = examples[0];
  $("examples").replaceChildren(...examples.map((query) => {
    const card = make("a", { href: link(query) }, query);
    card.addEventListener("click", (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return;
      event.preventDefault();
      go(link(query));
    });
    return make("li", {}, card);
  }));
}

frame();
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  const query = $("query").value.trim() || $("examples").querySelector("a")?.textContent;
  if (!query) return;
  $("query").value = query;
  $("query").blur();
  if (query === shown) search(query);
  else go(link(query));
});
$("panel").addEventListener("cancel", (event) => {
  event.preventDefault(); // Esc: the address changes, and the panel with it
  leave();
});
$("panel").addEventListener("click", (event) => {
  if (event.target === $("panel")) leave(); // beside it
});
$("panel").addEventListener("pointerover", (event) => {
  const token = event.target.closest(".token");
  if (token) tip(token, token.dataset.tip);
});
$("panel").addEventListener("pointerout", (event) => {
  if (event.target.closest(".token")) tip(null);
});
$("panel").addEventListener("scroll", () => tip(null), { passive: true });
addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.target.closest("input, dialog")) return;
  event.preventDefault();
  $("query").select();
});
addEventListener("popstate", render);
introduce().catch(() => {});
render();
