"use strict";
const form = document.getElementById("sign-in");
if (form && location.hash.length > 1) {
  document.getElementById("key").value = location.hash.slice(1);
  history.replaceState(null, "", location.pathname);
  form.submit();
}

const page = document.getElementById("dashboard");
const told = document.getElementById("connection");

function say(text, isLive) {
  told.textContent = text;
  told.className = isLive ? "live" : "";
}

function connect() {
  const source = new EventSource("/dashboard/events?seen=" + page.dataset.seen);
  source.onopen = () => say("live", true);
  source.onerror = () => {
    say("connecting …", false);
    if (source.readyState === EventSource.CLOSED) setTimeout(again, 5000);
  };
  source.addEventListener("seen", (event) => { page.dataset.seen = event.data; });
  for (const section of page.querySelectorAll("section[id]")) {
    source.addEventListener(section.id, (event) => { section.innerHTML = event.data; count(); });
  }
}

async function again() {
  try {
    const answer = await fetch("/dashboard", { redirect: "manual" });
    if (answer.type === "opaqueredirect") { location.reload(); return; }
  } catch { /* the server is away */ }
  connect();
}

function count() {
  for (const time of document.querySelectorAll("time[data-until]")) {
    const left = Math.round((Number(time.dataset.until) - Date.now()) / 1000);
    const note = time.nextElementSibling;
    if (note) note.textContent = left > 0 ? "UTC, in " + left + " s" : "UTC, now";
  }
}

if (page) {
  connect();
  count();
  setInterval(count, 1000);
}
