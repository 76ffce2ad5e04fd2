// Asks the page in a headless Chromium, and prints what it answers, as JSON:
//
//     node drive.mjs URL QUESTION SECONDS

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [url, question, seconds] = process.argv.slice(2);
const timeout = 1000 * Number(seconds);
const browser = await puppeteer.launch({
  executablePath: await chromium.executablePath(),
  args: ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"],
  headless: "shell",
  protocolTimeout: timeout,
});

/** Wait until the page says something that begins so, or that something went wrong. */
async function until(page, beginning) {
  const said = (beginning) => {
    const text = document.getElementById("status").textContent;
    return [beginning, "Error"].some((word) => text.startsWith(word)) && text;
  };
  const text = await (await page.waitForFunction(said, { timeout, polling: 100 }, beginning)).jsonValue();
  if (!text.startsWith(beginning)) throw new Error(text);
}

try {
  const page = await browser.newPage();
  page.on("console", (message) => console.error(message.text()));
  await page.goto(url, { waitUntil: "domcontentloaded" });
  await until(page, "Ready");
  await page.$eval("[name=question]", (field, text) => (field.value = text), question);
  await page.focus("[name=question]");
  await page.keyboard.press("Enter");
  await until(page, "Done");
  const found = await page.$eval("#answer", (answer) => ({
    agent: navigator.userAgent,
    isolated: crossOriginIsolated,
    text: answer.textContent,
    tokens: JSON.parse(answer.dataset.ids),
  }));
  console.log(JSON.stringify(found));
} finally {
  await browser.close();
}
