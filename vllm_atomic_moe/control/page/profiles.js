// The table of profiles: kept atoms, live requests, and the buttons for changes.

import { admin } from "./api.js";
import { byId, bytes, count, element, fill, percent, say, setText } from "./dom.js";

const SECONDS = 60;
const COLUMNS = ["state", "kept", "bytes", "tiles", "running", "waiting", "history", "actions"];
const LABELS = {
  state: "State",
  kept: "Atoms kept",
  bytes: "Bytes",
  tiles: "Live tiles",
  running: "Running",
  waiting: "Waiting",
  history: "Last minute",
};
const NUMBERS = ["bytes", "tiles", "running", "waiting"];
const STATES = {
  active: "requests that name no profile get it",
  loaded: "requests may name it",
  servable: "all of its atoms are in memory: it can be loaded",
  "not in memory": "it needs a restart that lists it in `resident`",
  "file gone": "loaded from a file that is no longer in the directory",
};

export class ProfileTable {
  #rows = new Map(); // name -> {row, cells, buttons, history, state}
  #profiles = new Map(); // name -> the directory's answer; loaded ones with widths
  #selected = null;
  #status = null;
  #busy = false;
  #reachable = true;
  #events;

  /** Calls `changed()` after every change made here, `selected(name, profile)` at a choice. */
  constructor(events) {
    this.#events = events;
    byId("refusal-close").addEventListener("click", () => this.#refuse(""));
  }

  /** Read the directory afresh, and widths and live tiles of what is loaded. */
  async read(status) {
    const { profiles } = await admin("GET", "profiles");
    const found = new Map(profiles.map((profile) => [profile.name, profile]));
    const wanted = [...Object.keys(status.profiles), this.#selected].filter((name) => found.has(name));
    for (const name of new Set(wanted)) {
      try {
        found.set(name, await admin("GET", `profiles/${name}`));
      } catch (error) {
        if (error.status !== 404 && error.status !== 409) throw error; // else it was removed
      }
    }
    this.#profiles = found;
    this.#arrange(status);
    await this.select(this.#rows.has(this.#selected) ? this.#selected : status.active);
  }

  /** Names that have a file, in the order of the table. */
  get names() {
    return [...this.#rows.keys()].filter((name) => this.#profiles.has(name));
  }

  /** Show the widths of one profile. */
  async select(name) {
    this.#selected = name;
    let profile = this.#profiles.get(name);
    if (profile && !profile.widths) {
      try {
        profile = await admin("GET", `profiles/${name}`);
        this.#profiles.set(name, profile);
      } catch (error) {
        this.#refuse(error.words);
        profile = undefined;
      }
    }
    if (this.#selected !== name) return; // another one was chosen meanwhile
    for (const [other, { row }] of this.#rows) row.classList.toggle("selected", other === name);
    this.#events.selected(name, profile, this.names);
  }

  /** The numbers of this second. */
  show(status) {
    this.#status = status;
    for (const [name, entry] of this.#rows) {
      const counts = status.profiles[name];
      for (const key of ["running", "waiting"]) {
        setText(entry.cells[key], counts ? count(counts[key]) : "–");
      }
      if (counts) entry.history.push(counts.running + counts.waiting);
      else entry.history.length = 0;
      entry.history.splice(0, entry.history.length - SECONDS);
      drawHistory(entry.cells.history.firstElementChild, entry.history);
    }
  }

  /** Whether changes can be asked for. */
  enable(reachable) {
    this.#reachable = reachable;
    this.#enableButtons();
  }

  #enableButtons() {
    const off = this.#busy || !this.#reachable;
    for (const button of byId("profiles").querySelectorAll("td button")) button.disabled = off;
    byId("reread").disabled = off;
  }

  // --- rows --------------------------------------------------------------------------------------

  #arrange(status) {
    const slot = (name) => status.profiles[name]?.slot ?? (this.#profiles.get(name).servable ? 16 : 17);
    const names = [...new Set([...this.#profiles.keys(), ...Object.keys(status.profiles)])];
    names.sort((one, two) => slot(one) - slot(two) || one.localeCompare(two, "en", { numeric: true }));
    const focused = document.activeElement?.closest("#profiles tr")?.dataset.name;
    const rows = new Map(names.map((name) => [name, this.#rows.get(name) ?? this.#row(name)]));
    this.#rows = rows;
    byId("profiles").tBodies[0].replaceChildren(...names.map((name) => rows.get(name).row));
    for (const name of names) this.#fill(name, status);
    this.#enableButtons();
    if (focused) rows.get(focused)?.row.querySelector("td button, th button")?.focus();
  }

  #row(name) {
    const choose = element("button", {
      class: "name",
      title: "Show its widths",
      onclick: () => {
        this.select(name);
        byId("widths-title").scrollIntoView({ block: "nearest", behavior: "smooth" });
      },
      text: name,
    });
    const method = element("span", { class: "method" });
    const head = element("th", { scope: "row", role: "rowheader" }, choose, method);
    const cells = Object.fromEntries(
      COLUMNS.map((key) => [
        key,
        element("td", {
          role: "cell",
          "data-label": LABELS[key] ?? "",
          class: NUMBERS.includes(key) ? "number" : key,
        }),
      ]),
    );
    cells.history.append(historyChart());
    const row = element("tr", { role: "row", "data-name": name }, head, ...Object.values(cells));
    return { row, cells, method, history: [], state: null };
  }

  #fill(name, status) {
    const { row, cells, method } = this.#rows.get(name);
    const profile = this.#profiles.get(name);
    const loaded = name in status.profiles;
    let state = "not in memory";
    if (name === status.active) state = "active";
    else if (loaded) state = profile ? "loaded" : "file gone";
    else if (profile.servable) state = "servable";
    row.dataset.state = state;
    setText(method, profile && profile.method !== name ? profile.method : "");
    cells.state.replaceChildren(element("span", { class: "badge", title: STATES[state], text: state }));
    if (profile) {
      const bar = element("div", { class: "bar", "aria-hidden": "true" }, element("div"));
      fill(bar.firstElementChild, profile.kept);
      cells.kept.replaceChildren(element("span", { text: percent(profile.kept) }), bar);
    } else {
      cells.kept.replaceChildren("–");
    }
    setText(cells.bytes, profile ? bytes(profile.bytes) : "–");
    setText(cells.tiles, profile?.live_tiles != null ? percent(profile.live_tiles) : "–");
    const button = (words, act) =>
      element("button", { "aria-label": `${words} ${name}`, onclick: act, text: words });
    const buttons = [];
    if (loaded && state !== "active") {
      buttons.push(button("Activate", () => this.#activate(name)));
      buttons.push(button("Unload", () => this.#change(name, "Unloaded", "DELETE", `profiles/${name}`)));
    } else if (!loaded) {
      buttons.push(button("Load", () => this.#change(name, "Loaded", "PUT", `profiles/${name}`)));
    }
    cells.actions.replaceChildren(...buttons);
  }

  // --- changes -----------------------------------------------------------------------------------

  async #activate(name) {
    const dialog = byId("activate");
    setText(byId("activate-name"), name);
    const others = Object.entries(this.#status.profiles).filter(([other]) => other !== name);
    setText(byId("abort-count"), others.reduce((sum, [, { running, waiting }]) => sum + running + waiting, 0));
    byId("abort").checked = false;
    dialog.returnValue = "cancel";
    dialog.showModal();
    await new Promise((closed) => dialog.addEventListener("close", closed, { once: true }));
    if (dialog.returnValue !== "activate") return;
    const running = byId("abort").checked ? "abort" : "finish";
    await this.#change(name, "Activated", "PUT", "active", { profile: name, running });
  }

  async #change(name, done, method, path, body) {
    this.#busy = true;
    this.#enableButtons();
    this.#refuse("");
    setText(byId("outcome"), `Asking the server about ${name} …`);
    try {
      const answer = await admin(method, path, body);
      setText(byId("outcome"), `${done} ${name}; generation ${answer.generation}.`);
    } catch (error) {
      setText(byId("outcome"), "");
      this.#refuse(error.words);
    } finally {
      this.#busy = false;
      this.#enableButtons();
      await this.#events.changed();
      this.#rows.get(name)?.row.querySelector("td button, th button")?.focus();
    }
  }

  #refuse(words) {
    say(byId("refusal-text"), words);
    byId("refusal").hidden = !words;
  }
}

// --- the last minute, as a line ------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

function historyChart() {
  const chart = document.createElementNS(SVG, "svg");
  chart.setAttribute("viewBox", `0 0 ${SECONDS} 20`);
  chart.setAttribute("preserveAspectRatio", "none");
  chart.setAttribute("role", "img");
  const [area, line] = ["path", "path"].map((tag) => document.createElementNS(SVG, tag));
  area.setAttribute("class", "area");
  line.setAttribute("class", "line");
  chart.append(area, line);
  return chart;
}

function drawHistory(chart, history) {
  chart.toggleAttribute("hidden", !history.length);
  if (!history.length) return;
  const most = Math.max(1, ...history);
  const x = (index) => SECONDS - history.length + index;
  const points = history.map((value, index) => `${x(index)} ${18.5 - (17 * value) / most}`);
  const [area, line] = chart.children;
  line.setAttribute("d", `M${points.join("L")}`);
  area.setAttribute("d", `M${x(0)} 20L${points.join("L")}L${x(history.length - 1)} 20Z`);
  chart.setAttribute("aria-label", `${history.at(-1)} requests now, ${Math.max(...history)} at most`);
}
