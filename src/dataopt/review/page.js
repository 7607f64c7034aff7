// Every text of the data goes into the page as textContent, and a decision is saved before the next suspect shows.
"use strict";

const KINDS = [
  { bit: 0, name: "All" },
  { bit: 1, name: "Label" },
  { bit: 2, name: "Outlier" },
  { bit: 4, name: "Near duplicate" },
];
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);

let names = []; // of the labels
let modality = "image";
let total = 0; // rows of the data set
let suspects = []; // {row, kinds}, in order
const decisions = new Map(); // row to {action, label, time}
let kind = 0; // the filter's bit; 0 shows all
let shown = []; // the suspects of the filter
let at = 0; // place in shown
let item = null; // what the page shows
let busy = false; // a decision or a suspect is on its way
let works = 0; // how many there were

// ---- small helpers

function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function drawn(tag, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

const count = (n) => n.toLocaleString("en");
const plural = (n, one, many) => `${count(n)} ${n === 1 ? one : many}`;
const nameOf = (label) => names[label] ?? `label ${label}`;

function number(value) {
  if (value === null) return "none";
  if (value === 0) return "0";
  const size = Math.abs(value);
  const text = size >= 1000 ? count(Math.round(value)) : size < 0.001 ? value.toExponential(1) : +value.toPrecision(3);
  return String(text).replaceAll("-", "−");
}

async function ask(path, body) {
  let answer;
  const options = body && { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  try {
    answer = await fetch(path, options);
  } catch {
    throw new Error("The server does not answer. Start dataopt review again and open the new address.");
  }
  if (answer.status === 403) throw new Error(await answer.text());
  const content = await answer.json().catch(() => ({}));
  if (!answer.ok) throw new Error(content.error ?? `The server failed (${answer.status}); see its terminal.`);
  return content;
}

function say(text) {
  $("status").textContent = text;
  $("problem").textContent = "";
}

function complain(error, before = "") {
  $("status").textContent = "";
  $("problem").textContent = before + error.message;
  $("problem").hidden = false;
}

/** Runs one thing at a time; what is pressed meanwhile was meant for what is no longer shown. */
async function alone(work, before = "") {
  if (busy) return;
  busy = true;
  works++;
  document.body.classList.add("busy");
  try {
    await work();
  } catch (error) {
    complain(error, before);
  } finally {
    busy = false;
    document.body.classList.remove("busy");
  }
}

// ---- the list

function filter(bit) {
  kind = bit;
  shown = bit ? suspects.filter((s) => s.kinds & bit) : suspects;
}

function undecidedFrom(start) {
  for (let i = 0; i < shown.length; i++) {
    const place = (start + i) % shown.length;
    if (!decisions.has(shown[place].row)) return place;
  }
  return -1;
}

function showProgress() {
  const done = shown.filter((s) => decisions.has(s.row)).length;
  $("bar").max = Math.max(shown.length, 1);
  $("bar").value = done;
  $("progress").textContent = `${count(done)} of ${count(shown.length)} decided`;
  $("place").textContent = `${count(at + 1)} of ${count(shown.length)}`;
  $("first").disabled = done === shown.length;
  $("previous").disabled = at === 0;
  $("next").disabled = at >= shown.length - 1;
  $("undo").disabled = decisions.size === 0;
  $("export").classList.toggle("ready", suspects.every((s) => decisions.has(s.row)));
  for (const button of $("kinds").children) button.setAttribute("aria-pressed", String(+button.dataset.bit === kind));
}

function showKinds() {
  const present = KINDS.filter(({ bit }) => bit === 0 || suspects.some((s) => s.kinds & bit));
  $("kinds").replaceChildren(
    ...present.map(({ bit, name }) => {
      const many = bit ? suspects.filter((s) => s.kinds & bit).length : suspects.length;
      const button = element("button", { type: "button" }, name, element("span", { className: "many" }, count(many)));
      button.dataset.bit = bit;
      button.onclick = () =>
        alone(async () => {
          filter(bit);
          await show(Math.max(undecidedFrom(0), 0));
        });
      return button;
    }),
  );
}

async function show(place) {
  const found = await ask(`/items/${shown[place].row}`);
  at = place;
  item = found;
  remember(item.row, item.decision); // another server may have decided
  history.replaceState(null, "", `/#${item.row}`);
  showSample();
  showDecision();
  showReasons();
  showNeighbours();
  showMap();
  showProgress();
  const heading = $("heading");
  const focused = document.activeElement;
  if (!focused || focused === document.body || focused === heading) heading.focus({ preventScroll: true });
}

function remember(row, decision) {
  if (decision) decisions.set(row, decision);
  else decisions.delete(row);
}

// ---- one suspect

function content(of, alt, small) {
  if (modality === "text") {
    const text = element("p", { className: "text", dir: "auto" }, of.text === null ? "no text" : of.text || "(empty)");
    if (of.cut) text.append(element("span", { className: "cut" }, " … cut here"));
    if (!small) {
      text.tabIndex = 0;
      text.setAttribute("role", "region");
      text.setAttribute("aria-label", alt);
    }
    return text;
  }
  if (!of.media) return element("p", { className: "text none" }, modality === "image" ? "no picture" : "no sound");
  if (modality === "image") {
    const picture = element("img", { alt, decoding: "async", draggable: false });
    picture.onload = () => picture.classList.toggle("coarse", picture.naturalWidth < 160 && picture.naturalHeight < 160);
    picture.onerror = () => picture.replaceWith(element("p", { className: "text none" }, "a picture that cannot be shown"));
    picture.src = `/media/${of.row}`;
    return picture;
  }
  const player = element("audio", { controls: true, preload: "auto" });
  player.setAttribute("aria-label", alt);
  // The whole file, so that any place in it can be played.
  const load = async () => {
    const sound = await fetch(`/media/${of.row}`);
    if (sound.ok) player.src = URL.createObjectURL(await sound.blob());
  };
  if (small) {
    const button = element("button", { type: "button", className: "plain play" }, "▶ Play");
    button.setAttribute("aria-label", `Play ${alt}`);
    button.onclick = async () => {
      await load();
      button.replaceWith(player);
      player.play().catch(() => {});
    };
    return button;
  }
  load().catch(() => {});
  const hint = element("p", { className: "play-key" }, element("kbd", {}, "P"), " plays and pauses");
  return element("div", { className: "player" }, player, hint);
}

function showSample() {
  for (const player of document.querySelectorAll("audio")) {
    player.pause();
    URL.revokeObjectURL(player.src);
  }
  $("heading").textContent = `Row ${count(item.row)}`;
  $("sample").replaceChildren(content(item, `Row ${item.row}, labelled ${nameOf(item.given)}`, false));
  $("given").textContent = nameOf(item.given);
  const other = item.suggested !== item.given;
  $("suggested").textContent = other ? nameOf(item.suggested) : "the same";
  $("suggested").classList.toggle("same", !other);
  $("relabel-text").textContent = other ? `Relabel as ${nameOf(item.suggested)}` : "Relabel";
  $("relabel").disabled = !other;
  $("main").hidden = false;
  $("empty").hidden = true;
}

function showDecision() {
  const decision = decisions.get(item.row);
  const text = { keep: "Kept", drop: "Dropped", relabel: `Relabelled as ${nameOf(decision?.label)}` };
  $("decided").textContent = decision ? text[decision.action] : "Undecided";
  $("decided").className = `decided ${decision ? decision.action : ""}`;
  if (decision) $("decided").title = new Date(decision.time).toLocaleString();
  else $("decided").removeAttribute("title");
  const suggested = decision?.action === "relabel" && decision.label === item.suggested;
  const pressed = {
    keep: decision?.action === "keep",
    relabel: suggested,
    other: decision?.action === "relabel" && !suggested,
    drop: decision?.action === "drop",
  };
  for (const [id, on] of Object.entries(pressed)) $(id).setAttribute("aria-pressed", String(on));
}

function showReasons() {
  const { kinds } = shown[at];
  const reasons = [];
  const against = item.neighbours.filter((n) => n.value < 0);
  if (kinds & 1 || kinds === 0) {
    const same = against.filter((n) => n.label === item.suggested).length;
    const sentence = element("li", { className: "label" }, element("b", {}, "Label. "));
    sentence.append(
      item.neighbours.length
        ? `${count(against.length)} of its ${plural(item.neighbours.length, "strongest neighbour", "strongest neighbours")} ` +
            `${against.length === 1 ? "conflicts" : "conflict"} with the label` +
            (same && item.suggested !== item.given ? `; ${count(same)} of them ${same === 1 ? "is" : "are"} ` : ".")
        : "No neighbour supports or contradicts the label.",
    );
    if (same && item.suggested !== item.given) sentence.append(element("bdi", {}, nameOf(item.suggested)), ".");
    reasons.push(sentence);
  }
  if (kinds & 2) {
    const sentence = "Few samples of the data set are like it.";
    reasons.push(element("li", { className: "outlier" }, element("b", {}, "Outlier. "), sentence));
  }
  if (kinds & 4) {
    const sentence = element("li", { className: "duplicate" }, element("b", {}, "Near duplicate. "));
    if (item.nearest) {
      const label = element("bdi", {}, nameOf(item.nearest.label));
      sentence.append("Almost the same as ", rowLink(item.nearest.row), ", labelled ", label, ".");
      if (item.nearest.media || item.nearest.text !== null) {
        const alt = `Row ${item.nearest.row}, labelled ${nameOf(item.nearest.label)}`;
        sentence.append(element("div", { className: "twin" }, content(item.nearest, alt, true)));
      }
    } else sentence.append("Another sample is almost the same.");
    reasons.push(sentence);
  }
  $("reasons").replaceChildren(...reasons);

  const line = (name, hint, value, rank) =>
    element(
      "tr",
      {},
      element("th", { scope: "row" }, name, element("small", {}, hint)),
      element("td", {}, number(value)),
      element("td", {}, rank === undefined ? "" : rank === null ? "none" : `${count(rank)} of ${count(total)}`),
    );
  const lines = [
    line("Relation", "high is bad", item.noisiness, item.noisiness_rank),
    line("Loss", "high is bad", item.loss, item.loss_rank),
    line("Label score", "0 to 1, low is bad", item.label_score),
    line("Outlier score", "0 to 1, low is bad", item.outlier_score),
    line("Near-duplicate score", "0 to 1, low is bad", item.near_duplicate_score),
  ];
  $("scores").replaceChildren(...lines);
}

/** A suspect can be gone to; another row is a plain number. */
function rowLink(row) {
  const place = suspects.findIndex((s) => s.row === row);
  if (place < 0) return element("span", {}, `row ${count(row)}`);
  const button = element("button", { type: "button", className: "link" }, `row ${count(row)}`);
  button.onclick = () => alone(() => goTo(row));
  return button;
}

async function goTo(row) {
  let place = shown.findIndex((s) => s.row === row);
  if (place < 0) {
    filter(0);
    place = shown.findIndex((s) => s.row === row);
  }
  if (place >= 0) await show(place);
}

function showNeighbours() {
  const most = Math.max(...item.neighbours.map((n) => Math.abs(n.value)), 1e-12);
  const card = (n) => {
    const alt = `Row ${n.row}, labelled ${nameOf(n.label)}`;
    const bar = drawn("svg", { class: "bar", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" });
    bar.append(
      drawn("rect", { class: "track", width: 100, height: 4 }),
      drawn("rect", { class: "value", width: Math.max(1, (100 * Math.abs(n.value)) / most), height: 4 }),
    );
    const label = element("b", { dir: "auto", title: nameOf(n.label) }, nameOf(n.label));
    const value = element("span", { className: "number", title: `similarity ${number(n.similarity)}` }, number(n.value));
    const made = element("li", {}, element("div", { className: "content" }, content(n, alt, true)));
    made.append(element("div", { className: "named" }, label, value), bar, element("small", {}, rowLink(n.row)));
    made.onmouseenter = () => mark(n.row, true);
    made.onmouseleave = () => mark(n.row, false);
    return made;
  };
  const fill = (id, found) => {
    $(id).className = `neighbours ${id} ${modality}`;
    $(id).replaceChildren(...found.map(card));
    if (!found.length) $(id).replaceChildren(element("li", { className: "nobody" }, "None among the strongest."));
  };
  fill("against", item.neighbours.filter((n) => n.value < 0));
  fill("for", item.neighbours.filter((n) => n.value > 0));
}

// ---- the map

function mark(row, on) {
  for (const point of document.querySelectorAll(`#map [data-row="${row}"]`)) point.classList.toggle("marked", on);
}

function showMap() {
  const several = item.map.some(([, , , std]) => std > 0);
  const points = several
    ? item.map.map(([row, label, mean, std, last]) => ({ row, label, x: mean, y: std, last }))
    : item.neighbours.map((n) => ({ row: n.row, label: n.label, x: n.value, y: n.similarity, last: n.value }));
  const note = several
    ? "Right agrees with the label, left conflicts; higher changed more between checkpoints. Colour: the last one."
    : "Right agrees with the label, left conflicts; higher is more similar.";
  $("map-note").textContent = points.length ? note : "No neighbour of weight.";
  if (!points.length) return $("map").replaceChildren();

  const width = Math.max($("map").clientWidth, 260);
  const [height, left, right, top, bottom] = [300, 58, 12, 12, 42];
  const reach = Math.max(...points.map((p) => Math.abs(p.x)), ...item.map.map(([, , mean]) => Math.abs(mean)), 1e-9) * 1.06;
  const ys = points.map((p) => p.y);
  const low = several ? 0 : Math.min(...ys, 1) - 0.05;
  const high = (several ? Math.max(...ys) * 1.08 : Math.max(...ys) + 0.05) || 1;
  const x = (value) => left + ((value + reach) / (2 * reach)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low || 1)) * (height - top - bottom);
  const last = Math.max(...points.map((p) => Math.abs(p.last)), 1e-12);
  const against = points.filter((p) => p.x < 0).length;

  const summary = `Relation map: ${count(against)} of ${plural(points.length, "neighbour", "neighbours")} conflict.`;
  const picture = drawn("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": summary });
  for (const value of ticks(-reach, reach, width < 420 ? 4 : 5)) {
    const middle = Math.abs(value) < 1e-12;
    picture.append(
      drawn("line", { class: middle ? "zero" : "grid", x1: x(value), x2: x(value), y1: top, y2: height - bottom }),
      drawn("text", { class: "tick", x: x(value), y: height - bottom + 16, "text-anchor": "middle" }, number(value)),
    );
  }
  for (const value of ticks(low, high, 4)) {
    picture.append(
      drawn("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      drawn("text", { class: "tick", x: left - 7, y: y(value) + 4, "text-anchor": "end" }, number(value)),
    );
  }
  const named = (text, attributes) => drawn("text", { class: "axis", ...attributes }, text);
  picture.append(
    named(several ? "mean relation" : "relation", { x: x(0), y: height - 6, "text-anchor": "middle" }),
    named("← conflicts", { class: "axis against", x: left, y: height - 6 }),
    named("agrees →", { class: "axis for", x: width - right, y: height - 6, "text-anchor": "end" }),
    named(several ? "spread (std)" : "similarity", {
      transform: `translate(13 ${(top + height - bottom) / 2}) rotate(-90)`, "text-anchor": "middle",
    }),
  );
  if (!several) {
    // The weaker neighbours have no similarity here: short strokes on the axis.
    const strong = new Set(points.map((p) => p.row));
    for (const [row, , mean] of item.map) {
      const stroke = { class: `rug ${mean < 0 ? "against" : "for"}`, x1: x(mean), x2: x(mean), y1: height - bottom - 7, y2: height - bottom };
      if (!strong.has(row)) picture.append(drawn("line", stroke));
    }
  }
  const near = new Set(item.neighbours.map((n) => n.row));
  const weak = [...points].sort((a, b) => Math.abs(a.last) - Math.abs(b.last)); // the strong ones on top
  for (const p of weak) {
    const text = `row ${p.row}, ${nameOf(p.label)}: ${number(p.x)}, ${several ? "std" : "similarity"} ${number(p.y)}`;
    const point = drawn("circle", {
      class: `point ${p.last < 0 ? "against" : "for"} ${near.has(p.row) ? "near" : ""}`,
      cx: x(p.x), cy: y(p.y), r: near.has(p.row) ? 6 : 4,
      "fill-opacity": 0.3 + (0.7 * Math.abs(p.last)) / last, "data-row": p.row,
    });
    point.append(drawn("title", {}, text + (several ? `, last ${number(p.last)}` : "")));
    picture.append(point);
  }
  $("map").replaceChildren(picture);
}

function ticks(low, high, about) {
  const rough = (high - low) / about;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = unit * ([1, 2, 5, 10].find((m) => m * unit >= rough) ?? 10);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) found.push(k * step);
  return found;
}

// ---- decisions

async function afterDecision(text) {
  const done = shown.filter((s) => decisions.has(s.row)).length;
  const next = undecidedFrom(at + 1);
  if (next >= 0) {
    await show(next);
    say(text);
  } else {
    showDecision();
    showProgress();
    const all = suspects.every((s) => decisions.has(s.row));
    say(`${text} ${all ? `All ${count(suspects.length)} are decided: Export writes the data set.` : `All ${count(done)} of this kind are decided.`}`);
  }
}

function decide(action, label = null) {
  const row = item?.row;
  return alone(async () => {
    const decision = await ask("/decide", { row, action, label });
    remember(row, decision);
    const text = { keep: "kept", drop: "dropped", relabel: `relabelled as ${nameOf(label)}` }[action];
    await afterDecision(`Row ${count(row)} ${text}.`);
  }, "Not saved. ");
}

function undo() {
  return alone(async () => {
    const { row, decision } = await ask("/undo", {});
    if (row === null) return say("Nothing to undo.");
    remember(row, decision);
    await goTo(row);
    say(`Row ${count(row)}: decision taken back.`);
  }, "Not undone. ");
}

function skip() {
  return alone(async () => {
    const next = undecidedFrom(at + 1);
    if (next < 0 || next === at) return say("No other suspect is undecided.");
    await show(next);
    say("Skipped.");
  });
}

function step(by) {
  const place = at + by;
  if (place < 0 || place >= shown.length) return;
  return alone(async () => {
    await show(place);
    say("");
  });
}

function firstUndecided() {
  return alone(async () => {
    const place = undecidedFrom(0);
    if (place < 0) return say("All are decided.");
    await show(place);
    say("");
  });
}

function exportAll() {
  return alone(async () => {
    say("Exporting …");
    say((await ask("/export", {})).message);
  }, "Nothing exported. ");
}

// ---- the labels

let options = []; // labels that match
let chosen = 0; // place in options

function openLabels() {
  if (busy || !item) return;
  $("labels-heading").textContent = `Relabel row ${count(item.row)}`;
  $("search").value = "";
  fillOptions();
  $("labels").showModal();
  $("search").focus();
}

function fillOptions() {
  const wanted = $("search").value.trim().toLowerCase();
  const likely = [item.suggested, ...item.neighbours.map((n) => n.label)].filter((label) => label !== item.given);
  const order = [...new Set([...likely, ...names.keys()])];
  options = order.filter((label) => nameOf(label).toLowerCase().includes(wanted));
  chosen = 0;
  $("options").replaceChildren(
    ...options.map((label, i) => {
      const hint = label === item.given ? "given" : label === item.suggested ? "suggested" : "";
      const option = element("li", { role: "option", id: `option-${i}` }, element("bdi", {}, nameOf(label)));
      if (hint) option.append(element("small", {}, hint));
      option.onclick = () => pick(label);
      return option;
    }),
  );
  if (!options.length) $("options").append(element("li", { className: "nobody" }, "No label has this in its name."));
  choose(0);
}

function choose(place) {
  $("options").children[chosen]?.removeAttribute("aria-selected");
  chosen = Math.min(Math.max(place, 0), options.length - 1);
  const option = options.length ? $("options").children[chosen] : null;
  option?.setAttribute("aria-selected", "true");
  option?.scrollIntoView({ block: "nearest" });
  if (option) $("search").setAttribute("aria-activedescendant", option.id);
  else $("search").removeAttribute("aria-activedescendant");
}

function pick(label) {
  $("labels").close();
  if (label === item.given) decide("keep");
  else decide("relabel", label);
}

$("search").oninput = fillOptions;
$("search").onkeydown = (event) => {
  if (event.isComposing) return;
  const by = { ArrowDown: 1, ArrowUp: -1, PageDown: 8, PageUp: -8 }[event.key];
  if (by) choose(chosen + by);
  else if (event.key === "Enter" && options.length) pick(options[chosen]);
  else if (event.key === "Escape") $("labels").close(); // or the first one would only empty the search
  else return;
  event.preventDefault();
};
$("labels").onclick = (event) => {
  if (event.target === $("labels")) $("labels").close(); // beside it
};

// ---- keys and buttons

const relabel = () => item && item.suggested !== item.given && decide("relabel", item.suggested);
const play = () => {
  const player = document.querySelector("#sample audio");
  if (player) player.paused ? player.play().catch(() => {}) : player.pause();
};
const keys = {
  k: () => item && decide("keep"),
  r: relabel,
  l: openLabels,
  d: () => item && decide("drop"),
  s: () => item && skip(),
  u: undo,
  f: firstUndecided,
  p: play,
  ArrowLeft: () => step(-1),
  ArrowRight: () => step(1),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.repeat || event.isComposing) return;
  if ($("labels").open || event.target.closest("input, textarea, select, audio")) return;
  const act = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
  if (!act) return;
  event.preventDefault();
  act();
});
const buttons = { keep: keys.k, relabel, other: openLabels, drop: keys.d, skip: keys.s, undo, first: firstUndecided };
for (const [id, act] of Object.entries(buttons)) $(id).onclick = act;
$("previous").onclick = keys.ArrowLeft;
$("next").onclick = keys.ArrowRight;
$("export").onclick = exportAll;

let drawnFor = 0;
addEventListener("resize", () => {
  if (item && innerWidth !== drawnFor) showMap();
  drawnFor = innerWidth;
});

// Another window or server may have decided while this one was away. This must not hold up a key.
addEventListener("focus", async () => {
  const before = works;
  const state = await ask("/state").catch(() => null);
  if (!state || !item || busy || works !== before) return;
  readDecisions(state.decisions);
  showDecision();
  showProgress();
});

function readDecisions(found) {
  decisions.clear();
  for (const decision of found) decisions.set(decision.row, decision);
}

alone(async () => {
  const opened = Number(location.hash.slice(1));
  const state = await ask("/state").catch((error) => {
    $("empty").textContent = error.message;
    $("empty").hidden = false;
    throw error;
  });
  ({ names, modality, total } = state);
  suspects = state.rows.map((row, i) => ({ row, kinds: state.kinds[i] }));
  readDecisions(state.decisions);
  filter(0);
  showKinds();
  if (!suspects.length) {
    $("empty").textContent = "There are no suspects: nothing to decide.";
    $("empty").hidden = false;
    history.replaceState(null, "", "/");
    return;
  }
  const asked = location.hash ? shown.findIndex((s) => s.row === opened) : -1;
  await show(asked >= 0 ? asked : Math.max(undecidedFrom(0), 0));
});
