// The list of findings: probability, where it lies among validation images, how training named it.

const SEEN = { report: "in reports", prompt: "in prompts", label: "as a label", none: "never" };

const SVG = "http://www.w3.org/2000/svg";

function svg(name, attributes, ...children) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.append(...children);
  return node;
}

export function element(name, attributes = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") node.className = value;
    else if (key === "text") node.textContent = value;
    else node.setAttribute(key, value);
  }
  node.append(...children);
  return node;
}

export const percent = (ratio) => `${Math.round(100 * ratio)} %`;

export function shown(probability) {
  if (probability > 0.999 && probability < 1) return "> 0.999";
  if (probability < 0.001 && probability > 0) return "< 0.001";
  return probability.toFixed(3);
}

// Above the line the validation images with the finding, below it those without.
function distribution(about, probability) {
  const { present, absent, low, high } = about.reference;
  const span = Math.max(high - low, 1e-9);
  const at = (value) => 2 + 296 * Math.min(1, Math.max(0, (value - low) / span));
  const picture = svg("svg", { viewBox: "0 0 300 34", preserveAspectRatio: "none", class: "scale", role: "img" });
  const bars = (counts, kind) => {
    const most = Math.max(1, ...counts);
    const width = 296 / counts.length;
    counts.forEach((count, i) => {
      const height = 15 * Math.sqrt(count / most);
      const y = kind === "present" ? 17 - height : 17;
      if (count) picture.append(svg("rect", { class: kind, x: 2 + i * width + 0.6, y, width: width - 1.2, height }));
    });
  };
  bars(present, "present");
  bars(absent, "absent");
  picture.append(svg("line", { class: "axis", x1: 0, x2: 300, y1: 17, y2: 17, "vector-effect": "non-scaling-stroke" }));
  if (about.threshold !== null) {
    const x = at(about.threshold);
    picture.append(svg("line", { class: "cut", x1: x, x2: x, y1: 2, y2: 32, "vector-effect": "non-scaling-stroke" }));
  }
  if (probability !== undefined) {
    const x = at(probability);
    picture.append(svg("line", { class: "here", x1: x, x2: x, y1: 0, y2: 34, "vector-effect": "non-scaling-stroke" }));
  }
  return picture;
}

function plainBar(probability) {
  const picture = svg("svg", { viewBox: "0 0 300 34", preserveAspectRatio: "none", class: "scale", role: "img" });
  picture.append(svg("rect", { class: "ground", x: 0, y: 13, width: 300, height: 8, rx: 3 }));
  if (probability !== undefined) {
    picture.append(svg("rect", { class: "plain", x: 0, y: 13, width: Math.max(2, 300 * probability), height: 8, rx: 3 }));
  }
  return picture;
}

// Where a score lies, in short texts: among all images, among those without it, and of the threshold.
function place(about, score) {
  if (!about) return ["", "", ""];
  if (about.reference === null) return ["no validation scores to hold it against", "", ""];
  const { below, probability } = score ?? {};
  if (!below) return ["", "", ""];
  const without = below.absent === null ? "" : ` (${percent(below.absent)} of those without it)`;
  const cut = about.threshold === null ? "" : probability >= about.threshold ? "above threshold" : "below threshold";
  return [`higher than ${percent(below.all)} of ${about.reference.n}`, without, cut];
}

// One row; `score` and `about` are undefined until there is an answer, and the row keeps its height.
export function row(finding, about, score, { mapped, canMap, onMap, onRemove }) {
  const value = element("span", { class: "value", text: score ? shown(score.probability) : "–" });
  const map = element("button", { type: "button", "aria-pressed": String(mapped), "aria-label": `Map of ${finding}`, text: "Map" });
  map.disabled = !canMap;
  map.dataset.map = finding;
  map.addEventListener("click", onMap);
  const remove = element("button", { type: "button", class: "remove", "aria-label": `Remove ${finding}`, text: "×" });
  remove.addEventListener("click", onRemove);
  const picture = about?.reference ? distribution(about, score?.probability) : plainBar(score?.probability);
  const [said, without, cut] = place(about, score);
  const seen = about?.seen ? `training named it ${SEEN[about.seen]}` : "";
  const spoken = [said + without, cut, seen].filter(Boolean).join(", ");
  picture.setAttribute("aria-label", score ? `${finding}: probability ${shown(score.probability)}; ${spoken}` : `${finding}: no answer yet`);
  const name = element("span", { class: "name", text: finding });
  if (about?.seen) name.append(element("span", { class: `pill ${about.seen}`, title: seen, text: SEEN[about.seen] }));
  const item = element(
    "li", { class: "finding" }, name, value, map, remove, picture,
    element("span", { class: "said" }, element("span", { text: said }, element("span", { class: "wide", text: without })), element(cut.startsWith("above") ? "b" : "span", { text: cut })),
  );
  item.dataset.finding = finding;
  return item;
}
