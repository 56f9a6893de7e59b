// Opens a page in headless Chromium, with and without scripts, on a desk and on
// a phone, light, dark and printed, and asks axe about each.
//
//   NODE_PATH=node_modules node tests/report_check.cjs PAGE.html FOLDER
//
// Screenshots go to FOLDER. Prints what is wrong and then exits with code 1.
const path = require('node:path');
const {pathToFileURL} = require('node:url');
const axe = require('axe-core');
const {chromium} = require('playwright-core');

const ARGUMENTS = [
  '--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run',
  '--disable-background-networking', '--disable-component-update',
  '--disable-sync',
];
const WIDTHS = {desktop: 1280, phone: 390};

async function look(browser, page, folder, device, colorScheme, wrong) {
  const name = `${device}-${colorScheme}`;
  const context = await browser.newContext({
    colorScheme, viewport: {width: WIDTHS[device], height: 900}, bypassCSP: true,
  });
  const tab = await context.newPage();
  tab.on('console', m => wrong.push(`${name}: console: ${m.text()}`));
  tab.on('pageerror', e => wrong.push(`${name}: ${e}`));
  tab.on('dialog', d => { wrong.push(`${name}: a dialog`); d.dismiss(); });
  tab.on('request', r => {
    if (r.url() !== page && !r.url().startsWith('data:')) {
      wrong.push(`${name}: asked for ${r.url()}`);
    }
  });
  await tab.goto(page);
  await tab.evaluate(() =>
    document.querySelectorAll('details').forEach(d => { d.open = true; }));
  const over = await tab.evaluate(() =>
    document.documentElement.scrollWidth - document.documentElement.clientWidth);
  if (over > 0) wrong.push(`${name}: ${over} pixels wider than the window`);
  await tab.screenshot({path: path.join(folder, `${name}.png`), fullPage: true});
  await tab.evaluate(axe.source);
  const {violations, passes} = await tab.evaluate(() => window.axe.run());
  for (const v of violations) {
    wrong.push(`${name}: axe: ${v.id}: ${v.help}: ${v.nodes[0].html}`);
  }
  console.log(`${name}: ${passes.length} axe rules pass, ` +
    `${violations.length} are violated`);
  await context.close();
}

async function withoutScripts(browser, page, folder, wrong) {
  const context = await browser.newContext({
    javaScriptEnabled: false, viewport: {width: 1280, height: 900},
  });
  const tab = await context.newPage();
  tab.on('console', m => wrong.push(`no scripts: console: ${m.text()}`));
  await tab.goto(page);
  const charts = await tab.locator('svg.chart').count();
  if (!charts) wrong.push('no scripts: no charts');
  await tab.pdf({path: path.join(folder, 'print.pdf'), format: 'A4'});
  console.log(`no scripts: ${charts} charts, printed`);
  await context.close();
}

(async () => {
  const [page, folder] = [pathToFileURL(process.argv[2]).href, process.argv[3]];
  const browser = await chromium.launch({
    executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: ARGUMENTS,
  });
  const wrong = [];
  for (const device of Object.keys(WIDTHS)) {
    for (const scheme of ['light', 'dark']) {
      await look(browser, page, folder, device, scheme, wrong);
    }
  }
  await withoutScripts(browser, page, folder, wrong);
  await browser.close();
  wrong.forEach(text => console.log(text));
  process.exit(wrong.length ? 1 : 0);
})();
