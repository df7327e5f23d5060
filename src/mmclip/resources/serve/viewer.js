// The stage: an image, its window, a map over it, and zoom by pointer and keyboard.

const ZOOM_MOST = 24;

export class Viewer {
  constructor(onZoom) {
    this.stage = document.getElementById("stage");
    this.layers = document.getElementById("layers");
    this.radiograph = document.getElementById("radiograph");
    this.canvas = document.getElementById("windowed");
    this.overlay = document.getElementById("overlay");
    this.onZoom = onZoom;
    this.size = null;
    this.zoom = 1;
    this.at = [0, 0];
    this.pointers = new Map();
    this.#listen();
  }

  show(image) {
    this.size = [image.width, image.height];
    this.radiograph.src = image.url;
    this.canvas.hidden = true;
    this.radiograph.hidden = false;
    this.layers.hidden = false;
    this.stage.classList.add("loaded");
    this.stage.querySelector(".drop").hidden = true;
    this.layers.style.width = `${image.width}px`;
    this.layers.style.height = `${image.height}px`;
    this.map(null);
    this.fit();
  }

  map(url) {
    this.overlay.hidden = url === null;
    if (url === null) this.overlay.removeAttribute("src"); else this.overlay.src = url;
  }

  strength(ratio) { this.overlay.style.opacity = ratio; }

  // Shows the values of a DICOM file by a window; null goes back to the image as it was filed.
  window(values, center, width) {
    if (values === null) {
      this.canvas.hidden = true;
      this.radiograph.hidden = false;
      return;
    }
    if (this.canvas.width !== values.width || this.canvas.height !== values.height) {
      this.canvas.width = values.width;
      this.canvas.height = values.height;
    }
    const grey = new Uint8ClampedArray(65536);
    const low = center - width / 2;
    for (let i = 0; i < 65536; i++) {
      const ratio = (values.low + values.step * i - low) / Math.max(width, 1e-9);
      grey[i] = 255 * (values.is_inverted ? 1 - ratio : ratio);
    }
    const context = this.canvas.getContext("2d");
    const shown = context.createImageData(values.width, values.height);
    const words = new Uint32Array(shown.data.buffer);
    const lut = Uint32Array.from(grey, (g) => 0xff000000 | (g << 16) | (g << 8) | g);
    for (let i = 0; i < words.length; i++) words[i] = lut[values.pixels[i]];
    context.putImageData(shown, 0, 0);
    this.canvas.hidden = false;
    this.radiograph.hidden = true;
  }

  get drawn() { return this.canvas.hidden ? this.radiograph : this.canvas; }

  get base() {
    const { clientWidth, clientHeight } = this.stage;
    return Math.min(clientWidth / this.size[0], clientHeight / this.size[1]);
  }

  fit() { this.zoom = 1; this.at = [0, 0]; this.#place(); }

  zoomBy(factor, x = this.stage.clientWidth / 2, y = this.stage.clientHeight / 2) {
    if (!this.size) return;
    const before = this.base * this.zoom;
    const [left, top] = this.#corner();
    this.zoom = Math.min(ZOOM_MOST, Math.max(1, this.zoom * factor));
    const after = this.base * this.zoom;
    // What lies under the pointer stays under it.
    const corner = [x - ((x - left) / before) * after, y - ((y - top) / before) * after];
    const free = this.#free();
    this.at = [corner[0] - free[0], corner[1] - free[1]];
    this.#place();
  }

  move(dx, dy) { this.at = [this.at[0] + dx, this.at[1] + dy]; this.#place(); }

  #free() {
    const scale = this.base * this.zoom;
    return [
      (this.stage.clientWidth - this.size[0] * scale) / 2,
      (this.stage.clientHeight - this.size[1] * scale) / 2,
    ];
  }

  #corner() {
    const free = this.#free();
    return [free[0] + this.at[0], free[1] + this.at[1]];
  }

  #place() {
    if (!this.size) return;
    const free = this.#free();
    // No side of the image leaves a gap that it could fill.
    this.at = this.at.map((value, i) => Math.max(-Math.max(0, -free[i]), Math.min(Math.max(0, -free[i]), value)));
    const [x, y] = this.#corner();
    const scale = this.base * this.zoom;
    this.layers.style.transform = `translate(${x}px, ${y}px) scale(${scale})`;
    this.onZoom(this.zoom);
  }

  #listen() {
    const place = (event) => {
      const box = this.stage.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    this.stage.addEventListener("wheel", (event) => {
      if (!this.size) return;
      event.preventDefault();
      this.zoomBy(Math.exp(-event.deltaY / 400), ...place(event));
    }, { passive: false });
    this.stage.addEventListener("pointerdown", (event) => {
      if (!this.size || event.target.closest("label")) return;
      this.pointers.set(event.pointerId, place(event));
      this.stage.setPointerCapture(event.pointerId);
      this.stage.classList.add("dragging");
    });
    this.stage.addEventListener("pointermove", (event) => {
      const before = this.pointers.get(event.pointerId);
      if (!before) return;
      const now = place(event);
      const other = [...this.pointers.entries()].find(([id]) => id !== event.pointerId)?.[1];
      this.pointers.set(event.pointerId, now);
      if (other) {
        const distance = (a, b) => Math.hypot(a[0] - b[0], a[1] - b[1]);
        const factor = distance(now, other) / Math.max(1, distance(before, other));
        this.zoomBy(factor, (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
      } else {
        this.move(now[0] - before[0], now[1] - before[1]);
      }
    });
    const end = (event) => {
      this.pointers.delete(event.pointerId);
      if (!this.pointers.size) this.stage.classList.remove("dragging");
    };
    this.stage.addEventListener("pointerup", end);
    this.stage.addEventListener("pointercancel", end);
    this.stage.addEventListener("dblclick", (event) => {
      if (this.size && !event.target.closest("label")) this.zoom > 1 ? this.fit() : this.zoomBy(3, ...place(event));
    });
    this.stage.addEventListener("keydown", (event) => {
      if (!this.size || event.ctrlKey || event.metaKey || event.altKey) return;
      const step = 40;
      const actions = {
        "+": () => this.zoomBy(1.25), "=": () => this.zoomBy(1.25), "-": () => this.zoomBy(0.8),
        "0": () => this.fit(),
        ArrowLeft: () => this.move(step, 0), ArrowRight: () => this.move(-step, 0),
        ArrowUp: () => this.move(0, step), ArrowDown: () => this.move(0, -step),
      };
      if (actions[event.key]) { event.preventDefault(); actions[event.key](); }
    });
    new ResizeObserver(() => this.#place()).observe(this.stage);
  }
}
