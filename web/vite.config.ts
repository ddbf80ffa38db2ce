import { svelte } from "@sveltejs/vite-plugin-svelte";
import { defineConfig } from "vitest/config";
import { precompress } from "./build/precompress.ts";

/** Where `npm run dev` finds the API: the mock, or a running `vestibule serve`. */
const api = process.env["VESTIBULE_API"] ?? "http://127.0.0.1:4100";
const proxied = { target: api, ws: true };

export default defineConfig({
  plugins: [svelte(), precompress()],
  build: {
    // noVNC uses top-level await.
    target: "es2022",
    // Inlined `data:` assets would need a wider content security policy.
    assetsInlineLimit: 0,
    modulePreload: { polyfill: false },
    reportCompressedSize: false,
  },
  server: {
    host: "127.0.0.1",
    port: 5173,
    proxy: { "/api": proxied, "/ready": proxied, "/health": proxied },
  },
  test: { include: ["src/**/*.test.ts"], environment: "node" },
});
