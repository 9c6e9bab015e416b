// Elements and numbers for people. Text is always text: the page's policy forbids innerHTML.

export const byId = (id) => document.getElementById(id);

/**
 * An element. Attributes that are functions become listeners (`onclick`), `text` its text; null and
 * false leave an attribute out.
 */
export function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (name === "text") node.textContent = value;
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** Set a text only where it changes: screen readers announce what is set. */
export function setText(node, text) {
  if (node.textContent !== String(text)) node.textContent = text;
}

/** Show a text in an element that is hidden while it has none. */
export function say(node, text) {
  setText(node, text);
  node.hidden = !text;
}

/** Fill a select with names, keeping what is chosen where it is still there. */
export function setOptions(select, names, fallback) {
  const chosen = names.includes(select.value) ? select.value : fallback;
  const shown = Array.from(select.options, (option) => option.value);
  if (names.join() !== shown.join()) {
    select.replaceChildren(...names.map((name) => element("option", { value: name, text: name })));
  }
  select.value = chosen;
}

/** A bar that is filled to a fraction; the text beside it says the number. */
export function fill(bar, fraction) {
  bar.style.width = `${100 * Math.min(1, fraction)}%`;
}

export const percent = (fraction) => `${(100 * fraction).toFixed(1)} %`;
export const count = (number) => number.toLocaleString("en-US");

export function bytes(number) {
  const units = ["bytes", "KiB", "MiB", "GiB", "TiB"];
  let power = 0;
  while (number >= 1024 && power < units.length - 1) {
    number /= 1024;
    power += 1;
  }
  return `${power ? number.toFixed(2) : number} ${units[power]}`;
}
