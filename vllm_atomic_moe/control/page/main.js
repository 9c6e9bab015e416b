// The operator's page: signs in, asks the server for its status once a second, and shows it.

import { admin, adminKey, servingKey } from "./api.js";
import { Compare } from "./compare.js";
import { byId, bytes, count, fill, percent, say, setText } from "./dom.js";
import { ProfileTable } from "./profiles.js";
import { Widths } from "./widths.js";

const POLL_MS = 1000;
const SLOW_MS = 3000;

let timer = null;
let turn = null; // the open question
let away = false;
let shown = null; // generation of the shown profiles; null: ask for them

const compare = new Compare();
const widths = new Widths((name) => table.select(name));
const table = new ProfileTable({
  changed: readAgain,
  selected: (name, profile, names) => widths.show(name, profile, names),
});

// --- signing in and out --------------------------------------------------------------------------

byId("login-form").addEventListener("submit", async (event) => {
  event.preventDefault();
  const field = byId("admin-key");
  const button = event.target.querySelector("button");
  setText(byId("login-error"), "");
  button.disabled = true;
  try {
    adminKey.set(field.value.trim());
    await admin("GET", "status");
    field.value = "";
    open();
  } catch (error) {
    signOut(error.words);
    field.select();
  } finally {
    button.disabled = false;
  }
});

byId("sign-out").addEventListener("click", () => {
  signOut("");
  location.reload(); // nothing stays in memory
});

function open() {
  byId("login").hidden = true;
  byId("console").hidden = false;
  shown = null; // it may be another server now
  poll();
}

function signOut(reason) {
  clearTimeout(timer);
  adminKey.forget();
  servingKey.forget();
  byId("activate").close();
  document.title = "atomic-moe";
  byId("console").hidden = true;
  byId("login").hidden = false;
  setText(byId("login-error"), reason);
  byId("admin-key").focus();
}

// --- asking once a second, while somebody looks --------------------------------------------------

function poll() {
  clearTimeout(timer);
  if (document.hidden || !adminKey.get()) return turn;
  turn ??= ask().finally(() => {
    turn = null;
    if (adminKey.get()) timer = setTimeout(poll, POLL_MS);
  });
  return turn;
}

async function readAgain() {
  await turn;
  shown = null;
  await poll();
}

async function ask() {
  const slow = setTimeout(() => setText(byId("connection"), "waiting for an answer"), SLOW_MS);
  try {
    const status = await admin("GET", "status");
    if (away || shown !== status.generation) {
      await table.read(status);
      shown = status.generation;
    }
    showStatus(status);
    reached();
  } catch (error) {
    if (error.status === 401 || error.status === 403) return signOut(error.words);
    if (!("words" in error)) console.error(error);
    lost(error.words ?? String(error));
  } finally {
    clearTimeout(slow);
  }
}

document.addEventListener("visibilitychange", () => {
  setText(byId("connection"), document.hidden ? "paused" : away ? "no answer" : "live");
  poll();
});

byId("reread").addEventListener("click", readAgain);

function reached() {
  away = false;
  setState("live");
  say(byId("trouble"), "");
}

function lost(words) {
  away = true;
  setState("no answer");
  say(byId("trouble"), `${words} The page shows its last answer and asks again every second.`);
}

function setState(words) {
  setText(byId("connection"), words);
  byId("connection").classList.toggle("lost", away);
  byId("console").classList.toggle("stale", away);
  table.enable(!away);
}

// --- what it says --------------------------------------------------------------------------------

function showStatus(status) {
  const { memory } = status;
  const counts = Object.values(status.profiles);
  const total = (key) => counts.reduce((sum, profile) => sum + profile[key], 0);
  const names = Object.keys(status.profiles);
  document.title = `${status.active} · atomic-moe`;
  setText(byId("active"), status.active);
  for (const key of ["running", "waiting", "admitted"]) setText(byId(key), count(total(key)));
  const fraction = memory.resident_bytes / memory.dense_bytes;
  setText(byId("resident"), bytes(memory.resident_bytes));
  const [resident, active] = byId("memory-bar").children;
  fill(resident, fraction);
  fill(active, memory.active_bytes / memory.dense_bytes);
  const ranks = memory.rank_resident_bytes.length;
  const share = ranks > 1 ? `, on ${ranks} ranks` : "";
  setText(
    byId("memory-note"),
    `${percent(fraction)} of ${bytes(memory.dense_bytes)} dense${share}; the active profile ` +
      `uses ${bytes(memory.active_bytes)}`,
  );
  setText(byId("engines"), status.engines);
  setText(byId("agreed"), status.agreed ? "all agree" : "do not agree");
  byId("agreed").classList.toggle("error-text", !status.agreed);
  setText(byId("generation"), status.generation);
  table.show(status);
  compare.offer(names, status.active);
}

if (adminKey.get()) open();
else signOut("");
