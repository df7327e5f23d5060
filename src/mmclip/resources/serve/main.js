// What the page knows, and what its parts do with it.

import { getJson, post, postJson } from "./api.js";
import { element, percent, row, shown } from "./findings.js";
import { saveCsv, savePng } from "./files.js";
import { during, say } from "./status.js";
import { listenToTheme } from "./theme.js";
import { Viewer } from "./viewer.js";

const FIRST_FINDINGS = ["atelectasis", "cardiomegaly", "consolidation", "edema", "pleural effusion"];
const $ = (id) => document.getElementById(id);

const state = {
  model: null,
  images: [], // { file, name, url, width, height, isDicom, scores, maps, values, error }
  current: null,
  findings: [],
  abouts: new Map(), // by finding
  prompts: "default",
  mapped: null, // the finding whose map is shown
  commands: new Map(), // by what they do
};

const viewer = new Viewer((zoom) => { $("zoom-at").textContent = zoom === 1 ? "fit" : `${Math.round(100 * zoom)} %`; });

// Images.

async function take(files) {
  for (const [i, file] of [...files].entries()) {
    const image = { file, name: file.name, scores: new Map(), maps: new Map(), error: null };
    const text = files.length > 1 ? `Reading ${file.name} (${i + 1} of ${files.length})` : `Reading ${file.name}`;
    let fault = null;
    await during(text, async () => {
      try {
        const answer = await post("api/image", [["image", file]]);
        const blob = await answer.blob();
        image.isDicom = answer.headers.get("X-Image-Kind") === "dicom";
        image.url = URL.createObjectURL(blob);
        const bitmap = await createImageBitmap(blob);
        [image.width, image.height] = [bitmap.width, bitmap.height];
        bitmap.close();
      } catch (error) { fault = error; throw error; }
    });
    if (fault) { image.error = fault.message; }
    state.images.push(image);
    drawStrip();
    if (!image.error) {
      await select(image);
      await scoreMissing();
    }
  }
}

async function select(image) {
  state.current = image;
  viewer.show(image);
  for (const id of ["zoom-in", "zoom-out", "zoom-fit", "save-png", "seek-image", "opacity"]) $(id).disabled = false;
  $("more").hidden = false;
  $("stage").setAttribute("aria-label", `Chest X-ray ${image.name}, ${image.width} by ${image.height} pixels`);
  drawStrip();
  drawFindings();
  drawBadge();
  prepareWindow(image);
  await showMap();
}

function drawStrip() {
  const many = state.images.length > 1 || state.images.some((image) => image.error);
  $("strip").replaceChildren(...(many ? state.images : []).map((image) => {
    const thumb = element("button", {
      type: "button", class: image.error ? "thumb bad" : "thumb",
      "aria-current": String(image === state.current), "aria-label": image.error ?? image.name, title: image.error ?? image.name,
    });
    if (image.error) thumb.textContent = "!"; else thumb.append(element("img", { src: image.url, alt: "" }));
    thumb.addEventListener("click", () => (image.error ? say(image.error, true) : select(image)));
    return thumb;
  }));
}

function step(by) {
  const sound = state.images.filter((image) => !image.error);
  if (sound.length < 2) return;
  const next = sound[(sound.indexOf(state.current) + by + sound.length) % sound.length];
  select(next).then(scoreMissing);
}

// Window and level of DICOM. The model reads the file's own window, whatever is shown here.

async function prepareWindow(image) {
  const controls = ["level", "width", "window-reset"].map($);
  for (const control of controls) control.disabled = true;
  if (!image.isDicom) return;
  if (image.values === undefined) {
    await during(`Reading the values of ${image.name}`, async () => {
      const answer = await post("api/image/values", [["image", image.file]]);
      if (answer.status === 204) { image.values = null; return; }
      const said = JSON.parse(answer.headers.get("X-Values"));
      image.values = { ...said, pixels: new Uint16Array(await answer.arrayBuffer()) };
    });
  }
  if (!image.values || image !== state.current) return;
  const { low, step: unit, pixels, window } = image.values;
  let most = 0;
  for (const value of pixels) if (value > most) most = value;
  const high = low + unit * most;
  const [center, width] = window ?? [(low + high) / 2, high - low];
  // Some 500 steps, of which one is the value that the file names.
  const set = (id, min, max, value) => {
    const size = unit * Math.max(1, Math.round((max - min) / unit / 500));
    const first = value - size * Math.ceil((value - min) / size);
    Object.assign($(id), { min: first, max, step: size, value });
  };
  set("level", Math.min(low, center), Math.max(high, center), center);
  set("width", unit, Math.max(high - low, width), width);
  image.filed = [center, width];
  for (const control of controls) control.disabled = false;
}

function changeWindow() {
  const { values } = state.current;
  viewer.window(values, Number($("level").value), Number($("width").value));
  drawBadge();
}

function resetWindow() {
  [$("level").value, $("width").value] = state.current.filed;
  viewer.window(null);
  drawBadge();
}

// Findings.

let scoring = Promise.resolve();

// One after another: who types while an image is scored must not have it scored twice.
function scoreMissing() {
  scoring = scoring.then(scoreAll);
  return scoring;
}

async function scoreAll() {
  const todo = [];
  for (const image of state.images.filter((each) => !each.error)) {
    const missing = state.findings.filter((name) => !image.scores.has(name));
    if (missing.length) todo.push([image, missing]);
  }
  if (todo.length) $("findings-note").textContent = "";
  for (const [i, [image, missing]] of todo.entries()) {
    const text = todo.length > 1 ? `Scoring ${image.name} (${i + 1} of ${todo.length})` : `Scoring ${image.name}`;
    await during(text, () => score(image, missing.filter((name) => state.findings.includes(name))));
  }
}

function note(text) {
  const said = $("findings-note").textContent;
  if (!said.includes(text)) $("findings-note").textContent = `${said} ${text}`.trim();
}

async function score(image, names) {
  if (!names.length) return;
  const prompts = state.prompts;
  let answer;
  try {
    answer = await postJson("api/classify", [
      ["image", image.file], ["prompts", prompts], ...names.map((name) => ["finding", name]),
    ]);
  } catch (error) {
    if (error.status !== 422) throw error;
    if (names.length === 1) { note(error.message); remove(names[0]); return; }
    // One of them cannot be asked of the model: the others can.
    const half = Math.ceil(names.length / 2);
    await score(image, names.slice(0, half));
    await score(image, names.slice(half));
    return;
  }
  if (prompts !== state.prompts) return; // another prompt set was chosen meanwhile
  const [scores] = answer.images;
  answer.findings.forEach((about, k) => {
    state.abouts.set(about.finding, about);
    image.scores.set(about.finding, { probability: scores.probabilities[k], below: scores.below[k] });
  });
  for (const text of answer.warnings) note(text);
  drawFindings();
}

function add(names) {
  const known = new Set(state.findings.map((name) => name.toLowerCase()));
  for (const name of names.map((each) => each.trim()).filter(Boolean)) {
    if (known.has(name.toLowerCase())) continue;
    known.add(name.toLowerCase());
    state.findings.push(name);
  }
  drawFindings();
  return scoreMissing();
}

function remove(name) {
  state.findings = state.findings.filter((each) => each !== name);
  if (state.mapped === name) { state.mapped = null; showMap(); }
  drawFindings();
}

function drawFindings() {
  const focused = document.activeElement?.closest?.("[data-finding]")?.dataset.finding;
  const names = [...state.findings];
  const scoreOf = (name) => state.current?.scores.get(name);
  if ($("order").value === "probability") names.sort((a, b) => (scoreOf(b)?.probability ?? -1) - (scoreOf(a)?.probability ?? -1));
  const canMap = Boolean(state.current) && state.model.has_text_encoder;
  $("findings").replaceChildren(...names.map((name) => row(name, state.abouts.get(name), scoreOf(name), {
    mapped: state.mapped === name, canMap,
    onMap: () => { toggleMap(name); $("stage").scrollIntoView({ block: "nearest", behavior: "smooth" }); },
    onRemove: () => remove(name),
  })));
  if (focused) $("findings").querySelector(`[data-map="${CSS.escape(focused)}"]`)?.focus();
  $("seen-note").hidden = !names.some((name) => state.abouts.get(name)?.seen);
  $("save-csv").disabled = !state.images.some((image) => image.scores.size);
  drawCommands();
}

// Maps.

function toggleMap(name) {
  state.mapped = state.mapped === name ? null : name;
  drawFindings();
  drawBadge();
  return showMap();
}

async function showMap() {
  const { current: image, mapped: name } = state;
  if (!image) return;
  if (name === null) { viewer.map(null); state.commands.delete("explain"); drawCommands(); return; }
  if (!image.maps.has(name)) {
    viewer.map(null);
    const answer = await during(`Drawing the map of ${name}`, () => postJson("api/explain", [
      ["image", image.file], ["phrase", name], ["prompts", state.prompts],
    ]));
    if (!answer) { if (state.mapped === name) { state.mapped = null; drawFindings(); drawBadge(); } return; }
    image.maps.set(name, answer);
  }
  if (image !== state.current || name !== state.mapped) return;
  viewer.map(image.maps.get(name).overlay);
  viewer.strength(Number($("opacity").value) / 100);
  drawBadge();
  drawCommands();
}

function drawBadge() {
  const { current: image, mapped } = state;
  if (!image) return;
  const parts = [image.name];
  if (!viewer.canvas.hidden) parts.push(`level ${Math.round($("level").value)}, window ${Math.round($("width").value)}`);
  const badge = $("badge");
  badge.replaceChildren(...(mapped ? [element("b", { text: mapped }), " · "] : []), parts.join(" · "));
  badge.hidden = false;
}

// Search.

async function seek(fields, what) {
  const answer = await during(`Searching by ${what}`, () => postJson("api/search", [...fields, ["top", "6"]]));
  if (!answer) return;
  state.commands.set("search", answer.command);
  $("near-note").textContent = `The nearest patients by ${what}; the cosine says how alike the model finds them, not how alike they are.`;
  $("found").replaceChildren(...answer.found.map((found) => element(
    "li", {},
    element("img", { src: found.image, alt: `Chest X-ray ${found.image_id}` }),
    element("p", { class: "facts" }, element("b", { text: `${found.rank}. cosine ${found.similarity.toFixed(3)}` }), element("span", { text: found.view === "unknown" ? "" : found.view })),
    element("p", { class: "id mono", text: found.image_id }),
    element("p", { class: "report", tabindex: "0", text: found.report ?? "No report." }),
  )));
  drawCommands();
}

// Commands.

function quoted(word) { return /^[\w@%+=:,./-]+$/.test(word) ? word : `'${word.replaceAll("'", "'\"'\"'")}'`; }

function drawCommands() {
  const sound = state.images.filter((image) => !image.error);
  const commands = [];
  if (sound.length && state.findings.length) {
    const words = ["mmclip", "predict", "--model", state.model.name, ...sound.map((image) => image.name)];
    if (state.model.has_text_encoder) for (const name of state.findings) words.push("--finding", name);
    if (state.prompts !== "default" && state.model.has_text_encoder) words.push("--prompts", state.prompts);
    commands.push([...words, "--out", "predictions.csv"].map(quoted).join(" "));
  }
  const map = state.mapped && state.current?.maps.get(state.mapped);
  if (map) commands.push(map.command);
  if (state.commands.has("search")) commands.push(state.commands.get("search"));
  if (!commands.length) return;
  $("commands").replaceChildren(...commands.map((command) => {
    const copy = element("button", { type: "button", text: "Copy", "aria-label": `Copy: ${command}` });
    copy.addEventListener("click", async () => {
      await navigator.clipboard?.writeText(command);
      copy.textContent = "Copied";
      setTimeout(() => { copy.textContent = "Copy"; }, 1500);
    });
    return element("li", {}, element("code", { text: command, tabindex: "0" }), copy);
  }));
}

// Wiring.

function listen() {
  const stage = $("stage");
  $("file").addEventListener("change", (event) => { take([...event.target.files]); event.target.value = ""; });
  for (const kind of ["dragenter", "dragover"]) {
    window.addEventListener(kind, (event) => { event.preventDefault(); stage.classList.add("over"); });
  }
  window.addEventListener("dragleave", (event) => { if (!event.relatedTarget) stage.classList.remove("over"); });
  window.addEventListener("drop", (event) => {
    event.preventDefault();
    stage.classList.remove("over");
    if (event.dataTransfer.files.length) take([...event.dataTransfer.files]);
  });
  window.addEventListener("paste", (event) => { if (event.clipboardData?.files.length) take([...event.clipboardData.files]); });
  stage.addEventListener("keydown", (event) => {
    if (event.key === ",") step(-1);
    if (event.key === ".") step(1);
    if (event.key.toLowerCase() === "m" && state.current) toggleMap(state.mapped ?? state.findings[0]);
  });
  $("zoom-in").addEventListener("click", () => viewer.zoomBy(1.5));
  $("zoom-out").addEventListener("click", () => viewer.zoomBy(1 / 1.5));
  $("zoom-fit").addEventListener("click", () => viewer.fit());
  $("opacity").addEventListener("input", () => {
    $("opacity-at").textContent = percent(Number($("opacity").value) / 100);
    viewer.strength(Number($("opacity").value) / 100);
  });
  for (const id of ["level", "width"]) $(id).addEventListener("input", changeWindow);
  $("window-reset").addEventListener("click", resetWindow);
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    add([$("finding").value]);
    $("finding").value = "";
  });
  $("lists").addEventListener("change", (event) => {
    const list = state.model.finding_lists[Number(event.target.value)];
    event.target.value = "";
    if (list) { state.findings = []; add(list.findings); }
  });
  $("prompts").addEventListener("change", (event) => {
    state.prompts = event.target.value;
    state.abouts.clear();
    for (const image of state.images) image.scores.clear();
    drawFindings();
    scoreMissing();
  });
  $("order").addEventListener("change", drawFindings);
  $("clear").addEventListener("click", () => { state.findings = []; state.mapped = null; showMap(); drawFindings(); drawBadge(); });
  $("save-csv").addEventListener("click", () => saveCsv(state.images.filter((image) => !image.error), state.findings));
  $("save-png").addEventListener("click", () => {
    const { current: image, mapped } = state;
    const score = mapped && image.scores.get(mapped);
    const first = mapped ? `${mapped}${score ? `: probability ${shown(score.probability)}` : ""}` : image.name;
    const lines = [first, `${image.name}, by ${state.model.name}. Research software, not a medical device.`];
    const overlay = viewer.overlay.hidden ? null : viewer.overlay;
    savePng(viewer.drawn, viewer.size, overlay, Number($("opacity").value) / 100, lines, `${image.name.replace(/\.[^.]*$/, "")}-view.png`);
  });
  $("seek").addEventListener("submit", (event) => {
    event.preventDefault();
    const phrase = $("phrase").value.trim();
    if (phrase) seek([["phrase", phrase]], `“${phrase}”`);
    else if (state.current) seek([["image", state.current.file]], state.current.name);
  });
  $("seek-image").addEventListener("click", () => seek([["image", state.current.file]], state.current.name));
}

async function start() {
  listenToTheme();
  const model = await during("Reading the model", () => getJson("api/model"));
  if (!model) return;
  state.model = model;
  const step = model.facts.step === undefined ? "" : `, step ${model.facts.step.toLocaleString("en")}`;
  const unit = model.zeroshot_rule === "similarity" ? "; scores are cosines" : "";
  $("model-line").textContent = `${model.name}${step}${unit}`;
  $("model-line").title = Object.entries(model.facts).map(([key, value]) => `${key}: ${value}`).join("\n");
  $("caution").textContent = model.caution;
  $("lists").append(...model.finding_lists.map((list, i) => element("option", { value: String(i), text: `${list.title} (${list.findings.length})` })));
  $("prompts").append(...model.prompt_sets.map((set) => element("option", { value: set.name, title: set.description, text: set.name })));
  $("prompts").closest("label").hidden = !model.has_text_encoder;
  $("ask").hidden = !model.has_text_encoder;
  $("near").hidden = model.index === null;
  $("legend").hidden = !model.has_reference;
  if (model.index) $("near-note").textContent = `${model.index.n_images.toLocaleString("en")} images, ${model.index.n_reports.toLocaleString("en")} with a report, in ${model.index.folders.join(", ")}.`;
  listen();
  const [first] = model.finding_lists;
  const isOwn = first && (!model.has_text_encoder || first.title.startsWith("Scored"));
  state.findings = isOwn ? [...first.findings] : FIRST_FINDINGS;
  drawFindings();
  document.body.dataset.ready = "true";
}

start();
