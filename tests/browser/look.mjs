// Open a page in Chromium at several widths and in both themes, and print what is wrong with it as JSON.
//
//   node look.mjs CHROMIUM PAGE.html SCREENSHOTS
//
// For each view: requests that are not of the file itself, errors of its console, violations of axe's rules (WCAG 2.1 A and AA
// and best practices), and by how many pixels the page is wider than the window. SCREENSHOTS gets a picture of each.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [executablePath, page, screenshots] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const address = pathToFileURL(page).href;
const views = [
  { name: "phone", width: 360, height: 740, colorScheme: "light" },
  { name: "desk", width: 1280, height: 900, colorScheme: "light" },
  { name: "night", width: 1280, height: 900, colorScheme: "dark" },
  { name: "paper", width: 794, height: 1123, colorScheme: "light", media: "print" },
];

const browser = await chromium.launch({ executablePath, args: ["--no-sandbox"] });
const found = {};
for (const { name, width, height, colorScheme, media } of views) {
  // The page forbids scripts; axe is one.
  const context = await browser.newContext({ viewport: { width, height }, colorScheme, bypassCSP: true });
  const tab = await context.newPage();
  const requests = [], errors = [];
  tab.on("request", (request) => requests.push(request.url()));
  tab.on("console", (message) => message.type() === "error" && errors.push(message.text()));
  tab.on("pageerror", (error) => errors.push(String(error)));
  await tab.goto(address);
  if (media) await tab.emulateMedia({ media, colorScheme });
  const overflow = await tab.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  const broken = await tab.evaluate(() => [...document.images].filter((image) => !image.naturalWidth).length);
  await tab.evaluate(axe);
  const { violations, passes } = await tab.evaluate(() => globalThis.axe.run());
  await tab.screenshot({ path: join(screenshots, `${name}.png`), fullPage: true });
  found[name] = {
    requests: requests.filter((url) => url !== address && !url.startsWith("data:")),
    errors, overflow, broken, rules: passes.length,
    violations: violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.slice(0, 3).map((node) => node.html.slice(0, 200)).join(" | ")}`),
  };
  await context.close();
}
await browser.close();
console.log(JSON.stringify(found));
