import { mount } from "svelte";
import "./app.css";
import App from "./App.svelte";

// A part of the page that is loaded late is gone after an upgrade: begin anew, unless that was just done.
addEventListener("vite:preloadError", () => {
  if (performance.now() > 10_000) location.reload();
});

const target = document.getElementById("app");
if (!target) throw new Error("index.html has no #app");
mount(App, { target });
