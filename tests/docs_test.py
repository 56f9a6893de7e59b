"""Pages say what is: links lead somewhere, and commands, fields and code exist."""

import importlib.util
import inspect
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator

import pytest

import hetlora_jax
from hetlora_jax import config
from hetlora_jax.methods import registry

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [*ROOT.glob('*.md'), *(ROOT / 'docs').rglob('*.md')]
MADE = ('api.md', 'api/', 'flags.md', 'methods.md', 'notebooks/', 'tutorial.md')


@pytest.mark.parametrize('page', PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_to_files(page):
  text = re.sub(r'(?s)```.*?```', '', page.read_text())
  for target in re.findall(r'\]\(([^)\s]+)\)|src(?:set)?="([^"]+)"', text):
    target = ''.join(target)
    if target.startswith('https://') or target.startswith('#'):
      continue
    path = (page.parent / target.partition('#')[0]).resolve()
    made = str(path.relative_to(ROOT)).startswith(
      tuple(f'docs/{name}' for name in MADE)
    )
    assert made or path.exists(), f'{page.name} links to {target}'


def _hooks():
  if not importlib.util.find_spec('mkdocs'):
    pytest.skip('mkdocs is not installed; `make docs` installs it')
  from docs import hooks

  return hooks


def test_made_pages_have_every_method_rule_and_page():
  methods = _hooks().methods_page()
  for name, method in registry.METHODS.items():
    assert f'| `{name}` |' in methods
    assert method.citation.partition(',')[0] in methods
  for rules in registry.ROLES.values():
    assert all(f'| `{rule}`' in methods for rule in rules)
  assert set(_hooks().api_pages()) > {'api.md', 'api/hetlora_jax.lora.md'}


def test_fields_are_all_listed_with_their_defaults():
  lines = list(_hooks()._fields())
  for name, field in config.FIELDS.items():
    assert any(f'| `{name}` | `{field.default!r}` |' in line for line in lines)


def test_flags_are_all_listed():
  hooks = _hooks()
  asked = 'from docs import hooks; print(hooks.flags_page())'
  page = subprocess.run(
    [sys.executable, '-W', 'ignore', '-c', asked],  # it forgets flags
    cwd=ROOT, capture_output=True, text=True, check=True,
  ).stdout  # fmt: skip
  for program in hooks.PROGRAMS:
    text = (ROOT / f'launch/{program}.py').read_text()
    for flag in re.findall(r"DEFINE_\w+\(\s*'(\w+)'", text):
      assert f'| `--{flag}` |' in page, (program, flag)


def test_pictures_are_xml():
  import xml.etree.ElementTree

  from docs import pictures

  for name in pictures.PICTURES:
    root = xml.etree.ElementTree.fromstring(pictures.draw(name))
    assert root.tag.endswith('svg'), name
    assert [x for x in root.iter() if x.tag.endswith('text')], name


# Written before they land with the front door; to be emptied then.
LANDING: set[str] = set()
FIELDS = set(config.FIELDS)
BLOCK = re.compile(r'(?ms)^```(\w+)\n(.*?)^```')


def _blocks(language: str) -> Iterator[tuple[str, str]]:
  """Yields the fenced blocks of a language, with their page's name."""
  for page in PAGES:
    for found, text in BLOCK.findall(page.read_text()):
      if found == language:
        yield page.name, text


def _commands() -> list[tuple[str, list[str]]]:
  """Returns the words of every command in a block of sh."""
  found = []
  for page, text in _blocks('sh'):
    for line in text.replace('\\\n', ' ').splitlines():
      words = shlex.split(line, comments=True)
      for i, word in enumerate(words):
        if word == 'make' or word.startswith('hetlora-'):
          found.append((page, words[i:]))
        if word == '-m' and 'python' in words[i - 1]:
          found.append((page, words[i + 1 :]))
  return found


def _flags(program: str) -> set[str]:
  """Returns the flags that a launcher defines, those that all share included."""
  sources = [(ROOT / f'launch/{name}.py').read_text() for name in (program, 'flags')]
  return set(re.findall(r"DEFINE_\w+\(\s*'(\w+)'", ''.join(sources))) | LANDING


def _check_launcher(program: str, words: list[str]) -> None:
  for word in words:
    flag, _, value = word.partition('=')
    if flag.startswith('--config.'):
      assert flag.removeprefix('--config.') in FIELDS, word
    elif flag.startswith('--') and flag != '--':
      assert flag[2:] in _flags(program), word
    if flag in ('--config', '--sweep') and value != '...':
      assert (ROOT / value.partition(':')[0]).exists(), word


@pytest.mark.parametrize('page, words', _commands(), ids=str)
def test_commands_on_pages_exist(page, words):
  program, *rest = words
  if program == 'make':
    targets = re.findall(r'(?m)^([\w./$()-]+):', (ROOT / 'Makefile').read_text())
    assert rest[0].replace('.venv', '$(VENV)') in targets, rest[0]
  elif program.startswith(('hetlora-', 'launch.')):
    _check_launcher(re.split('[-.]', program)[1], rest)
  else:
    assert importlib.util.find_spec(program), program


def test_fields_on_pages_exist():
  sections = '|'.join({name.partition('.')[0] for name in FIELDS if '.' in name})
  for page in PAGES:
    if page.name in ('log.md', 'CHANGELOG.md', 'WORKSPACE_NOTES.md'):
      continue  # they tell of the past too
    named = re.findall(rf'`((?:{sections})\.[a-z_.]+)[`=]', page.read_text())
    unknown = [x for x in named if x not in FIELDS | LANDING and not _is_code(x)]
    assert not unknown, (page.name, unknown)


def _is_code(name: str) -> bool:
  """Says whether a dotted name is a file or is in the module of that name."""
  module, _, rest = name.partition('.')
  path = ROOT / f'hetlora_jax/{module}.py'
  named = path.exists() and rest in path.read_text()
  return named or rest in ('py', 'safetensors')


@pytest.mark.parametrize('page, text', list(_blocks('python')))
def test_python_on_pages_compiles_and_names_what_is_there(page, text):
  compile(text, page, 'exec')
  if hasattr(hetlora_jax, 'train'):
    for name in re.findall(r'\bhl\.(\w+)', text):
      assert hasattr(hetlora_jax, name), (page, name)


def test_inlined_code_is_there():
  page = (ROOT / 'docs/methods/hetlora.md').read_text()
  names = re.findall(r'<!-- code: ([\w.]+) -->', page)
  assert len(names) > 5
  for name in names:
    module, _, function = name.rpartition('.')
    assert inspect.getsource(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize(
  'page, most', [('README.md', 130), ('WORKSPACE_NOTES.md', 300)]
)
def test_pages_stay_short(page, most):
  assert len((ROOT / page).read_text().splitlines()) <= most
