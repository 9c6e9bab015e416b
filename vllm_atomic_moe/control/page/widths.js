// The heat map: layers down, experts to the right; darker is wider.

import { byId, count, element, percent, setOptions, setText } from "./dom.js";

const LEFT = 34; // pixels for the numbers of layers
const TOP = 18; // and for the experts'
const LEVELS = 64; // of color

export class Widths {
  #name = null;
  #layers = []; // [layer, width of every expert]
  #full = 0; // intermediate size
  #cell = { width: 0, height: 0 };
  #at = null; // [row, expert] under the pointer
  #canvas = byId("map-canvas");

  /** `choose(name)` is called when another profile is chosen here. */
  constructor(choose) {
    byId("widths-profile").addEventListener("change", (event) => choose(event.target.value));
    this.#canvas.addEventListener("pointermove", (event) => this.#pointTo(this.#under(event)));
    this.#canvas.addEventListener("pointerleave", () => this.#pointTo(null));
    this.#canvas.addEventListener("blur", () => this.#pointTo(null));
    this.#canvas.addEventListener("focus", () => {
      if (this.#canvas.matches(":focus-visible")) this.#pointTo(this.#at ?? [0, 0]);
    });
    this.#canvas.addEventListener("keydown", (event) => this.#move(event));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.#draw());
    new ResizeObserver(() => this.#draw()).observe(byId("map"));
  }

  /** Show a profile: the answer to `GET profiles/{name}`, or undefined if its file is gone. */
  show(name, profile, names = []) {
    setOptions(byId("widths-profile"), names, name);
    byId("widths-profile").value = name;
    setText(byId("widths-name"), name);
    this.#name = name;
    this.#layers = Object.entries(profile?.widths ?? {})
      .map(([layer, widths]) => [Number(layer), widths])
      .sort(([one], [two]) => one - two);
    const all = this.#layers.flatMap(([, widths]) => widths);
    const kept = all.reduce((sum, width) => sum + width, 0);
    // kept = sum of widths / (experts of all layers * intermediate size)
    this.#full = kept ? Math.round(kept / (profile.kept * all.length)) : 0;
    setText(byId("legend-high"), count(this.#full));
    const experts = this.#layers[0]?.[1].length ?? 0;
    setText(
      byId("widths-note"),
      profile
        ? `${this.#layers.length} layers of ${experts} experts of ${count(this.#full)} atoms: ` +
            `${percent(profile.kept)} kept, ${count(all.filter((width) => !width).length)} of ` +
            `${count(all.length)} experts have width 0`
        : "Its file is no longer in the directory.",
    );
    this.#canvas.setAttribute("aria-label", `Widths of ${name}, layers by experts`);
    this.#pointTo(null);
    this.#draw();
    this.#tabulate();
  }

  // --- drawing -----------------------------------------------------------------------------------

  #draw() {
    const experts = this.#layers[0]?.[1].length ?? 0;
    const rows = this.#layers.length;
    const room = byId("map").clientWidth - LEFT;
    const width = Math.max(4, Math.min(72, Math.floor(room / Math.max(1, experts))));
    const height = Math.max(5, Math.min(32, Math.floor(480 / Math.max(1, rows))));
    this.#cell = { width, height };
    const [across, down] = [LEFT + width * experts, TOP + height * rows];
    const scale = devicePixelRatio;
    Object.assign(this.#canvas, { width: across * scale, height: down * scale });
    Object.assign(this.#canvas.style, { width: `${across}px`, height: `${down}px` });
    const pen = this.#canvas.getContext("2d");
    pen.scale(scale, scale);
    const gap = width > 6 && height > 6 ? 1 : 0;
    const colors = palette();
    this.#layers.forEach(([, widths], row) =>
      widths.forEach((atoms, expert) => {
        const [x, y] = [LEFT + expert * width, TOP + row * height];
        pen.fillStyle = colors.of(atoms / this.#full);
        pen.fillRect(x, y, width - gap, height - gap);
        if (!atoms) frame(pen, x, y, width - gap, height - gap, colors.frame);
      }),
    );
    this.#number(pen, colors.text);
  }

  #number(pen, color) {
    const { width, height } = this.#cell;
    const experts = this.#layers[0]?.[1].length ?? 0;
    pen.fillStyle = color;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    const everyRow = stepOf(14 / height);
    this.#layers.forEach(([layer], row) => {
      if (row % everyRow === 0) pen.fillText(layer, LEFT - 8, TOP + (row + 0.5) * height);
    });
    pen.textAlign = "center";
    const everyExpert = stepOf(28 / width);
    for (let expert = 0; expert < experts; expert += everyExpert) {
      pen.fillText(expert, LEFT + (expert + 0.5) * width, TOP / 2);
    }
  }

  #tabulate() {
    const rows = this.#layers.map(([layer, widths]) => {
      const sorted = [...widths].sort((one, two) => one - two);
      const sum = sorted.reduce((total, width) => total + width, 0);
      const numbers = [
        this.#full ? percent(sum / (sorted.length * this.#full)) : "–",
        count(sorted[0]),
        count(sorted[sorted.length >> 1]),
        count(sorted.at(-1)),
        count(sorted.filter((width) => !width).length),
      ];
      const cells = numbers.map((text) => element("td", { class: "number", text }));
      return element("tr", {}, element("th", { scope: "row", text: layer }), ...cells);
    });
    byId("layers").tBodies[0].replaceChildren(...rows);
  }

  // --- pointing ----------------------------------------------------------------------------------

  #under(event) {
    const row = Math.floor((event.offsetY - TOP) / this.#cell.height);
    const expert = Math.floor((event.offsetX - LEFT) / this.#cell.width);
    return this.#layers[row]?.[1][expert] === undefined ? null : [row, expert];
  }

  #move(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    if (event.key === "Escape") this.#pointTo(null);
    if (!steps[event.key] || !this.#layers.length) return;
    event.preventDefault();
    const [row, expert] = this.#at ?? [0, -1];
    const [down, right] = steps[event.key];
    const limit = (value, size) => Math.max(0, Math.min(size - 1, value));
    this.#pointTo([
      limit(row + down, this.#layers.length),
      limit(expert + right, this.#layers[0][1].length),
    ]);
  }

  #pointTo(at) {
    const [tip, mark] = [byId("map-cell"), byId("map-mark")];
    if (String(at) === String(this.#at) && !tip.hidden === Boolean(at)) return;
    this.#at = at;
    tip.hidden = mark.hidden = !at;
    if (!at) return;
    const [row, expert] = at;
    const [layer, widths] = this.#layers[row];
    const share = this.#full ? ` (${percent(widths[expert] / this.#full)})` : "";
    setText(tip, `Layer ${layer}, expert ${expert}: ${widths[expert]} of ${this.#full} atoms${share}`);
    const { width, height } = this.#cell;
    const left = LEFT + expert * width;
    const y = TOP + row * height;
    this.#reveal(left, width);
    Object.assign(mark.style, {
      left: `${left}px`,
      top: `${y}px`,
      width: `${width}px`,
      height: `${height}px`,
    });
    const x = left + width / 2 - byId("map-scroll").scrollLeft;
    const most = byId("map").clientWidth - tip.offsetWidth;
    tip.style.left = `${Math.max(0, Math.min(most, x - tip.offsetWidth / 2))}px`;
    tip.style.top = `${y - tip.offsetHeight - 6}px`;
  }

  /** Scroll a cell into view, where the map is wider than the page. */
  #reveal(left, width) {
    const box = byId("map-scroll");
    const [from, to] = [left - LEFT, left + 2 * width - box.clientWidth];
    if (box.scrollLeft > from) box.scrollLeft = from;
    else if (box.scrollLeft < to) box.scrollLeft = to;
  }
}

/** Colors of the style sheet, mixed: of(0..1), and that of the frames at width 0. */
function palette() {
  const scale = getComputedStyle(byId("legend-scale"));
  const mixed = Array.from({ length: LEVELS + 1 }, (_, level) => {
    const share = (100 * level) / LEVELS;
    return `color-mix(in oklab, ${scale.color} ${share}%, ${scale.backgroundColor})`;
  });
  return {
    of: (fraction) => (fraction ? mixed[Math.round(fraction * LEVELS)] : scale.outlineColor),
    frame: scale.borderTopColor,
    text: getComputedStyle(byId("map-keys")).color,
  };
}

/** An empty frame: nothing is left here. */
function frame(pen, x, y, width, height, color) {
  pen.strokeStyle = color;
  pen.strokeRect(x + 0.5, y + 0.5, width - 1, height - 1);
}

/** The least of 1, 2, 5, 10, 20, … that is not below. */
function stepOf(least) {
  for (let power = 1; ; power *= 10) {
    for (const step of [1, 2, 5]) if (step * power >= least) return step * power;
  }
}
