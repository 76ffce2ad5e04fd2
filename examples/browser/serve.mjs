// The page and a bundle on http://localhost:
//
//     npm install && node serve.mjs FOLDER [PORT]

import { createReadStream, existsSync, statSync } from "node:fs";
import { createServer } from "node:http";
import { extname, join, posix, resolve } from "node:path";
import { pipeline } from "node:stream";

const KINDS = {
  ".html": "text/html",
  ".js": "text/javascript",
  ".json": "application/json",
  ".mjs": "text/javascript",
  ".wasm": "application/wasm",
};

const [bundle, port = "8000"] = process.argv.slice(2);
if (bundle === undefined || !existsSync(join(bundle, "manifest.json"))) {
  console.error(`error: ${bundle ?? "nothing"} is no bundle: name a folder that comp compress --bundle made.`);
  process.exit(2);
}

/** The file that a request is for, or `null` if it can't be read as one. */
function fileOf(url) {
  let path;
  try {
    // Normalized as an absolute path, so that it can't lead out of the folder.
    path = posix.normalize(decodeURIComponent(new URL(url, "http://localhost").pathname));
  } catch {
    return null;
  }
  if (path.startsWith("/bundle/")) return join(resolve(bundle), path.slice("/bundle".length));
  return join(import.meta.dirname, path === "/" ? "index.html" : path);
}

const server = createServer((request, response) => {
  const file = fileOf(request.url);
  if (file === null || !statSync(file, { throwIfNoEntry: false })?.isFile()) {
    response.writeHead(file === null ? 400 : 404).end();
    return;
  }
  response.writeHead(200, {
    "Content-Type": KINDS[extname(file)] ?? "application/octet-stream",
    "Content-Length": statSync(file).size,
    // WebAssembly has threads only in a page that is isolated from others.
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Opener-Policy": "same-origin",
  });
  pipeline(createReadStream(file), response, () => {});
});
server.on("error", (error) => {
  console.error(`error: port ${port} can't be had (${error.code}); name another one behind the folder.`);
  process.exit(2);
});
server.listen(Number(port), "localhost", () => console.log(`http://localhost:${server.address().port}/`));
