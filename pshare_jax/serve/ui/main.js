// The page: listens to the engine's events, and hands them to its parts.

import { events, key, request, setKey } from "./api.js";
import { modelRows, sessionRows, tierRows, totals, workerRows } from "./figures.js";
import { Playground } from "./playground.js";
import { SharingMap, colour, summary } from "./sharing_map.js";

const AGAIN_SECONDS = 2;
const at = (id) => document.getElementById(id);

const playground = new Playground();
const sharingMap = new SharingMap(at("map"), at("page-details"));
let before = null;
let models = [];
let lastMap = null;
let lastSessions = [];

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function showStatus(text, bad = false) {
  at("status").textContent = text;
  at("status").classList.toggle("bad", bad);
  at("status").classList.toggle("ready", text === "ready");
}

function fillTable(id, rows) {
  at(id).replaceChildren(
    ...rows.map((cells) => {
      const row = document.createElement("tr");
      row.append(...cells.map((text) => element("td", text)));
      return row;
    }),
  );
}

function showState(state) {
  const now = state.dead ? `failed: ${state.dead}` : state.ready ? "ready" : "warming up";
  showStatus(now, Boolean(state.dead));
  at("totals").replaceChildren(
    ...totals(before, state).map(([name, text]) => {
      const box = document.createElement("div");
      box.append(element("dt", name), element("dd", text));
      return box;
    }),
  );
  fillTable("models", modelRows(before, state));
  fillTable("workers", workerRows(before, state));
  before = state;
  fillTable("tiers", tierRows(state));
  at("tiers-table").hidden = !Object.keys(state.tiers).length;
  showSessions();
  const served = Object.keys(state.models);
  if (JSON.stringify(served) === JSON.stringify(models)) return;
  models = served;
  playground.offer(models);
  at("legend").replaceChildren(
    ...models.map((name) => {
      const item = document.createElement("li");
      const mark = document.createElement("i");
      mark.style.background = colour(models, name);
      item.append(mark, name);
      return item;
    }),
  );
  if (lastMap) showMap(lastMap);
}

function showMap(map) {
  lastMap = map;
  sharingMap.draw(models, map);
  at("map-summary").textContent = summary(map);
}

function showSessions() {
  at("no-sessions").hidden = lastSessions.length > 0;
  at("sessions-table").hidden = !lastSessions.length;
  if (before) fillTable("sessions", sessionRows(lastSessions, before.time));
}

/** What each event of the stream does. */
const SHOW = {
  state: showState,
  map: showMap,
  sessions: ({ sessions }) => {
    lastSessions = sessions;
    showSessions();
  },
};

let listening = null;

/** Listens for good; after an error it tries again, unless the key is wrong. */
async function listen() {
  listening?.abort();
  const { signal } = (listening = new AbortController());
  while (!signal.aborted) {
    try {
      const response = await request("/ui/events", { signal });
      for await (const data of events(response)) {
        const event = JSON.parse(data);
        SHOW[event.type]?.(event);
      }
      showStatus("the server has ended the stream", true);
    } catch (error) {
      if (signal.aborted) return;
      showStatus(error.message, true);
      if (error.status === 401) return at("key").focus();
      // A key that may not see what all do may still ask.
      if (error.status === 403) return offerModels();
    }
    before = null;
    await new Promise((resolve) => setTimeout(resolve, AGAIN_SECONDS * 1000));
  }
}

async function offerModels() {
  const { data } = await (await request("/v1/models")).json();
  playground.offer(data.map(({ id }) => id));
}

at("key").value = key();
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value);
  listen();
});
listen();
