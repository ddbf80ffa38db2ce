import { defineConfig } from "vitest/config";

/** The built dashboard in a real Chromium, against the mock server. */
export default defineConfig({
  test: {
    include: ["e2e/**/*.test.ts"],
    environment: "node",
    testTimeout: 60_000,
    hookTimeout: 60_000,
    fileParallelism: false,
  },
});
