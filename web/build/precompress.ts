/**
 * A Vite plugin that writes `.gz` and `.br` beside every text file of the finished build, so that the server, which
 * embeds the files, never compresses anything itself. A variant that saves less than a tenth is not written.
 */
import { readdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { promisify } from "node:util";
import { brotliCompress, constants, gzip } from "node:zlib";
import type { Plugin } from "vite";

const TEXT = /\.(?:html|js|css|svg|json|txt|webmanifest)$/;
const brotli = promisify(brotliCompress);
const deflate = promisify(gzip);

async function compress(path: string): Promise<void> {
  const bytes = await readFile(path);
  const variants = [
    [".gz", await deflate(bytes, { level: 9 })],
    [".br", await brotli(bytes, { params: { [constants.BROTLI_PARAM_QUALITY]: 11 } })],
  ] as const;
  for (const [suffix, small] of variants) {
    if (small.length < bytes.length * 0.9) await writeFile(path + suffix, small);
  }
}

export function precompress(): Plugin {
  let outDir = "dist";
  return {
    name: "precompress",
    apply: "build",
    configResolved(config) {
      outDir = join(config.root, config.build.outDir);
    },
    async closeBundle() {
      const files = await readdir(outDir, { recursive: true });
      await Promise.all(files.filter((f) => TEXT.test(f)).map((f) => compress(join(outDir, f))));
    },
  };
}
