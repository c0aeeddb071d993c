// The tree of one pass as a picture: the accepted path is the straight line on top, ending in the model's own choice.

import { drawn, percent, visible } from "./format.js";

const CHARACTER = 7.25, ROW = 48, HEIGHT = 26, GAP = 20, EDGE = 10, TOP = 4;
// A mark for each source, told apart by its shape.
const SHAPES = {
  circle: (x, y) => drawn("circle", { cx: x, cy: y, r: 3.6 }),
  diamond: (x, y) => drawn("path", { d: `M${x} ${y - 4.6}l4.6 4.6-4.6 4.6-4.6-4.6z` }),
  square: (x, y) => drawn("rect", { x: x - 3.5, y: y - 3.5, width: 7, height: 7 }),
  triangle: (x, y) => drawn("path", { d: `M${x} ${y - 4.4}l4.6 8h-9.2z` }),
  star: (x, y) => drawn("path", { d: `M${x - 4} ${y}h8M${x} ${y - 4}v8`, "stroke-width": 2.4, class: "line" }),
};
const KNOWN = { "transfer layers": "circle", "text": "diamond" };
const OTHERS = ["square", "triangle", "star"];
const given = new Map();

/** The name of a source's shape: others than those known get the next one that is free. */
export function shapeOf(source) {
  if (KNOWN[source]) return KNOWN[source];
  if (!given.has(source)) given.set(source, OTHERS[given.size % OTHERS.length]);
  return given.get(source);
}

/** A mark by itself, for a legend. */
export function mark(source) {
  const picture = drawn("svg", { viewBox: "0 0 12 12", width: 12, height: 12, class: "source", "aria-hidden": "true" });
  picture.append(SHAPES[shapeOf(source)](6, 6));
  return picture;
}

/** What a pass verified as boxes: the nodes of the tree, and the model's own choice behind the last accepted one. */
export function boxesOf(pass) {
  const accepted = new Set(pass.accepted);
  const boxes = pass.nodes.map((node, place) => ({
    ...node,
    place,
    kind: place === 0 ? "root" : accepted.has(place) ? "accepted" : "rejected",
    given: place === 0 ? 1 : node.probability / pass.nodes[node.parent].probability,
  }));
  const last = pass.accepted.at(-1);
  const own = pass.tokens.at(-1);
  boxes.push({ text: own.text, token: own.token, parent: last, kind: "own", sources: [], place: null });
  return boxes;
}

/** Give each box its column and row: below a box those on the accepted path come first, then the likelier ones. */
function place(boxes) {
  const children = boxes.map(() => []);
  boxes.forEach((box, index) => index && children[box.parent].push(index));
  const rank = (index) => (boxes[index].kind === "rejected" ? -boxes[index].probability : -2);
  let rows = 0;
  const visit = (index, column) => {
    const box = boxes[index];
    box.column = column;
    box.row = rows;
    children[index].sort((a, b) => rank(a) - rank(b));
    children[index].forEach((child, order) => {
      if (order) rows += 1;
      visit(child, column + 1);
    });
  };
  visit(0, 0);
  return rows + 1;
}

function labelOf(box) {
  const name = JSON.stringify(box.text);
  if (box.kind === "root") return `${name}, certain before this pass`;
  if (box.kind === "own") return `${name}, the model's own choice`;
  const taken = box.kind === "accepted" ? "accepted" : "not taken";
  const by = box.sources.length ? box.sources.join(" and ") : "no source";
  return `${name}, ${taken}; proposed by ${by}; path ${percent(box.probability)}, after its parent ${percent(box.given)}`;
}

/** Draw the tree of `pass`, in the hue of this number. */
export function drawTree(pass, hue) {
  const boxes = boxesOf(pass);
  const rows = place(boxes);
  const widths = [];
  for (const box of boxes) {
    box.shown = visible(box.text);
    box.told = box.place ? percent(box.probability) : "";
    const marks = box.sources.length ? 2 + 11 * box.sources.length : 0;
    box.width = Math.max(34, 18 + marks + CHARACTER * [...box.shown].length);
    widths[box.column] = Math.max(widths[box.column] ?? 0, box.width);
  }
  const lefts = [];
  widths.reduce((left, width, column) => ((lefts[column] = left), left + width + GAP), EDGE);
  const width = lefts.at(-1) + widths.at(-1) + EDGE;
  const height = rows * ROW + TOP;
  const accepted = pass.accepted.length - 1;
  const picture = drawn("svg", {
    viewBox: `0 0 ${width} ${height}`,
    class: `tree hue-${hue}`,
    role: "img",
    "aria-label": `A tree of ${pass.nodes.length - 1} drafts, ${accepted} of them accepted`,
  });
  const edges = drawn("g", { class: "edges" });
  const nodes = drawn("g", { class: "nodes" });
  // As wide as the panel lets it be, unless its text would be too small to read: then it is scrolled.
  picture.style.width = `min(${width}px, max(100%, ${Math.round(0.8 * width)}px))`;
  for (const box of boxes) {
    const x = lefts[box.column], y = middle(box);
    if (box.kind !== "root") {
      const parent = boxes[box.parent];
      const from = lefts[parent.column] + parent.width, above = middle(parent);
      const d = y === above ? `M${from} ${y}H${x}` : `M${x - GAP} ${above}C${x - 5} ${above} ${x - GAP + 3} ${y} ${x} ${y}`;
      if (y !== above && from < x - GAP) edges.append(drawn("path", { d: `M${from} ${above}H${x - GAP}`, class: `edge ${box.kind}` }));
      edges.append(drawn("path", { d, class: `edge ${box.kind}` }));
    }
    nodes.append(drawBox(box, x, y));
  }
  picture.append(edges, nodes);
  return picture;
}

const middle = (box) => TOP + box.row * ROW + HEIGHT / 2;

function drawBox(box, x, y) {
  const group = drawn("g", { class: `node ${box.kind}`, "data-node": box.place ?? "own" });
  const title = drawn("title");
  title.textContent = labelOf(box);
  const frame = drawn("rect", { x, y: y - HEIGHT / 2, width: box.width, height: HEIGHT, rx: box.kind === "root" ? 13 : 7 });
  group.append(title, frame);
  let at = x + 9;
  for (const source of box.sources) {
    const shape = SHAPES[shapeOf(source)](at + 4, y);
    shape.classList.add("source");
    group.append(shape);
    at += 11;
  }
  const token = drawn("text", { x: at + (box.sources.length ? 2 : 0), y: y + 4.2, class: "word" });
  token.textContent = box.shown;
  group.append(token);
  if (box.told) {
    const told = drawn("text", { x: x + box.width / 2, y: y + HEIGHT / 2 + 13, class: "probability", "text-anchor": "middle" });
    told.textContent = box.told;
    group.append(told);
  }
  return group;
}
