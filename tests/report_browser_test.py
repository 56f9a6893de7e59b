"""The page in headless Chromium: axe, console, network, screenshots.

`make report-check` keeps the screenshots in /tmp/report_check.
"""

import os
import pathlib
import shutil
import subprocess
import tempfile

import pytest
import report_test

from hetlora_jax.tools import report

HERE = pathlib.Path(__file__).parent
PACKAGES = ('axe-core@4', 'playwright-core@1')
FOLDER = pathlib.Path(tempfile.gettempdir()) / 'report_check'
swept = report_test.swept


def _modules() -> pathlib.Path:
  """Installs what the check needs, once, outside the repository."""
  modules = FOLDER / 'node_modules'
  if not all((modules / p.partition('@')[0]).is_dir() for p in PACKAGES):
    subprocess.run(
      ['npm', 'install', '--no-audit', '--no-fund', '--prefix', FOLDER,
       *PACKAGES],
      check=True, capture_output=True, timeout=300,
    )  # fmt: skip
  return modules


@pytest.mark.slow
def test_axe_finds_nothing_and_nothing_is_asked_for(swept):
  chromium = os.environ.get('CHROMIUM') or shutil.which('chromium')
  if not chromium:
    pytest.skip('no chromium: apt-get install chromium, or set CHROMIUM')
  if not shutil.which('npm') or not shutil.which('node'):
    pytest.skip('no npm: install Node.js, which brings it')
  FOLDER.mkdir(exist_ok=True)
  report.write([swept], FOLDER / 'page.html')
  done = subprocess.run(
    ['node', HERE / 'report_check.cjs', FOLDER / 'page.html', FOLDER],
    env=os.environ | {'NODE_PATH': str(_modules()), 'CHROMIUM': chromium},
    capture_output=True, text=True, timeout=300,
  )  # fmt: skip
  print(done.stdout)
  assert done.returncode == 0, done.stdout + done.stderr
  assert done.stdout.count('0 are violated') == 4
