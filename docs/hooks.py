"""Pages that are made from the code at each build, and pictures within pages."""

import ast
import importlib
import inspect
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator

from absl import flags
from mkdocs.structure.files import File

from docs import pictures
from hetlora_jax import config as config_lib
from hetlora_jax.formats import gguf
from hetlora_jax.methods import registry

ROOT = pathlib.Path(__file__).parent.parent
PROGRAMS = ('flags', 'train', 'evaluate', 'sweep', 'export', 'report', 'data')


def _cell(text: object) -> str:
  return str(text).replace('|', '\\|').replace('\n', ' ').replace('<', '&lt;')


def _table(*rows: tuple) -> str:
  """Returns a Markdown table; the first row is its head."""
  head, *rest = [f'| {" | ".join(map(_cell, row))} |' for row in rows]
  return '\n'.join([head, '|---' * len(rows[0]) + '|', *rest, ''])


def _own_flags(program: str) -> list[flags.Flag]:
  """Returns the flags that a launcher defines, and forgets them.

  Several launchers have an --out.
  """
  module = importlib.import_module(f'launch.{program}')
  own = list(
    flags.FLAGS.flags_by_module_dict()[module.__name__]
  )  # forgetting shortens it
  for flag in own if program != 'flags' else ():
    delattr(flags.FLAGS, flag.name)
  return [f for f in own if not f.name.startswith('config.')]


def _fields() -> Iterator[str]:
  sections: dict[str, list] = {}
  for path, f in config_lib.FIELDS.items():
    notes = [config_lib.told(f)]
    notes += ['May vary within a program.'] if path in config_lib.VARIES else []
    sections.setdefault(path.rpartition('.')[0], []).append(
      (f'`{path}`', f'`{f.default!r}`', ' '.join(filter(None, notes)))
    )
  for section, rows in sections.items():
    yield f'### {section or "run"}\n'
    yield _table(('field', 'default', 'meaning'), *rows)


def flags_page() -> str:
  """Lists every field of a configuration and every flag of a launcher."""
  lines = [
    '# Fields and flags\n',
    'Made from `hetlora_jax/config.py` and the launchers. Any field is a flag: '
    '`--config.federated.r_max=32`; `--print_config` shows those of a run.\n',
    '## Fields\n',
    *_fields(),
    '## Flags\n',
  ]
  for program in PROGRAMS:
    title = 'All but report and data' if program == 'flags' else f'launch.{program}'
    rows = [
      (f'`--{f.name}`', '' if f.default is None else f'`{f.default!r}`', f.help)
      for f in sorted(_own_flags(program), key=lambda f: f.name)
    ]
    lines += [f'### {title}\n', _table(('flag', 'default', 'meaning'), *rows)]
  return '\n'.join(lines)


def _linked(citation: str) -> str:
  """Makes arXiv ids links."""
  return re.sub(
    r'arXiv (\d{4}\.\d{5})', r'[arXiv \1](https://arxiv.org/abs/\1)', citation
  )


def _first_line(function) -> str:
  return (function.__doc__ or '').strip().partition('\n')[0]


def methods_page() -> str:
  """Lists every method, and every rule with what it does."""
  usual = registry.Method._field_defaults
  methods = [
    (
      f'`{name}`',
      ', '.join(
        f'{role} `{rule}`'
        for role, rule in row._asdict().items()
        if role != 'citation' and rule != usual[role]
      ),
      _linked(row.citation),
    )
    for name, row in registry.METHODS.items()
  ]
  lines = [
    '# Methods\n',
    'Made from `hetlora_jax/methods/registry.py`. A method is a row of names of '
    'rules; `--config.method` chooses one, and `--config.methods.ROLE` puts '
    'another rule in its place. The traits of rules decide which fit together.\n',
    _table(('method', 'rules that differ from the default', 'source'), *methods),
    '## Rules\n',
  ]
  for role, rules in registry.ROLES.items():
    module = sys.modules.get(f'hetlora_jax.methods.{role}')
    about = module.__doc__.strip() if module else ''
    rows = [
      (
        f'`{name}`' + (' (default)' if usual[role] == name else ''),
        _linked(_first_line(rule.function)) if rule.function else '',
        ', '.join(sorted(rule.traits)),
      )
      for name, rule in rules.items()
    ]
    lines += [f'### {role}\n', f'{about}\n', _table(('rule', 'what', 'traits'), *rows)]
  return '\n'.join(lines)


FAMILIES = {  # family -> models, what it needs besides Llama's parts
  'gemma2': ('Gemma 2', 'soft caps of scores and logits; a window in every other layer; '
             'norms after each block; scaled embeddings'),
  'gemma3': ('Gemma 3 (text)', 'norms of q and k; a window in five of six layers, with a '
             'RoPE base of its own; norms after each block; scaled embeddings'),
  'llama': ('Llama 2 and 3.x, SmolLM2', 'biases, if it says so'),
  'mistral': ('Mistral 7B, Nemo', 'a window in every layer, if it says so'),
  'phi3': ('Phi-3 and Phi-4 mini', 'fused matrices; partly rotated heads; LongRoPE; a '
           'window in every layer'),
  'qwen2': ('Qwen 2 and 2.5', 'biases of q, k and v; a window from a layer on'),
  'qwen3': ('Qwen 3', 'norms of q and k; heads of any width; a window from a layer on'),
  'smollm3': ('SmolLM3', 'every fourth layer without positions'),
}  # fmt: skip


def families_table() -> str:
  """Lists the families, with the differences that were measured."""
  measured = json.loads((ROOT / 'tests/golden/families.json').read_text())
  rows = []
  for family, (models, needs) in FAMILIES.items():
    found = {n: x for n, x in measured.items() if n.partition(' ')[0] == family}
    told = ', '.join(
      f'{x:.0e}' + (f' ({n.partition(" ")[2]})' if ' ' in n else '')
      for n, x in found.items()
    )
    architecture = family if family in gguf.FAMILIES else 'llama'
    rows.append((f'`{family}`', models, needs, told, f'`{architecture}`'))
  head = ('family', 'models', "besides Llama's parts", 'difference', 'GGUF')
  return _table(head, *rows)


def configs_page() -> str:
  """Lists the experiments that come with the package."""
  lines = [
    '# Experiments\n',
    'What `configs/` holds, in the words of each file. They come with the '
    'package: `--config=configs/tiny.py` works in any folder.\n',
  ]
  for path in sorted((ROOT / 'configs').glob('[!_]*.py')):
    about = ast.get_docstring(ast.parse(path.read_text())) or ''
    lines.append(f'## {path.stem}\n\n```text\n{about}\n```\n')
  return '\n'.join(lines)


def tutorial_page() -> str:
  """Turns docs/tutorial.py round: its comments are text, the rest is code."""
  text = (ROOT / 'docs/tutorial.py').read_text().partition('\n\n')[2]
  parts = re.split(r'(?m)^((?:#.*\n)+)', text)
  out = []
  for part in parts:
    if part.startswith('#'):
      out.append(re.sub(r'(?m)^# ?', '', part))
    elif part.strip():
      out.append(f'```python\n{part.strip()}\n```\n')
  return '\n'.join(out)


def _executed(path: pathlib.Path):
  """Runs a script of cells as a notebook; raises what a cell raises."""
  import jupytext
  from nbclient import NotebookClient

  notebook = jupytext.read(path)
  # As in the tests: compiling is most of it.
  flags = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
  env = os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags}
  client = NotebookClient(notebook, resources={'metadata': {'path': str(ROOT)}})
  client.execute(env=env)
  return notebook


def notebook_files() -> dict[str, str | bytes]:
  """Returns the pages of docs/notebooks with what their cells print and draw."""
  import nbconvert
  import nbformat

  files = {}
  for path in sorted((ROOT / 'docs/notebooks').glob('*.py')):
    name, notebook = path.stem, _executed(path)
    page, found = nbconvert.MarkdownExporter().from_notebook_node(
      notebook, {'output_files_dir': f'{name}_files', 'unique_key': name}
    )
    note = (
      f'This page is `docs/notebooks/{path.name}`, executed when the documentation was '
      f'built; [the notebook]({name}.ipynb), with its outputs.\n'
    )
    # Tables as all others of the site.
    page = re.sub(r'(?s)<style scoped>.*?</style>\n', '', page)
    page = page.replace('<table border="1" class="dataframe">', '<table>')
    page = re.sub(r'\n{3,}', '\n\n', page)
    head, _, rest = page.partition('\n\n')
    files[f'notebooks/{name}.md'] = f'{head.strip()}\n\n{note}\n{rest}'
    files[f'notebooks/{name}.ipynb'] = nbformat.writes(notebook)
    files |= {f'notebooks/{place}': data for place, data in found['outputs'].items()}
  return files


def _modules() -> Iterator[tuple[str, str]]:
  """Yields every module's name, and the first line of its docstring."""
  for path in sorted((ROOT / 'hetlora_jax').rglob('*.py')):
    name = '.'.join(path.relative_to(ROOT).with_suffix('').parts)
    about = ast.get_docstring(ast.parse(path.read_text())) or ''
    if about and not path.stem.startswith('_') or path.name == '__init__.py':
      yield name.removesuffix('.__init__'), about.partition('\n')[0]


def api_pages() -> dict[str, str]:
  """Returns a page a module, from its docstrings, and one that lists them."""
  pages, rows = {}, []
  for name, about in _modules():
    pages[f'api/{name}.md'] = f'# {name}\n\n::: {name}\n'
    rows.append((f'[{name}](api/{name}.md)', about))
  head = (
    '# API\n\nStart with [the package](api/hetlora_jax.md) and '
    '[training](api/hetlora_jax.training.md); a round is '
    '[rounds](api/hetlora_jax.rounds.md), its types '
    '[types](api/hetlora_jax.types.md).\n\n'
  )
  return pages | {'api.md': head + _table(('module', 'what'), *rows)}


def _of_repository(name: str) -> str:
  """Returns a page of the root folder, its links into docs/ made right."""
  return (ROOT / name).read_text().replace('](docs/', '](')


def on_config(config):
  """Drops the page of results where there is none yet."""
  if not (ROOT / 'docs/results.md').exists():
    for section in config.nav:
      for title, pages in section.items():
        if isinstance(pages, list):
          section[title] = [p for p in pages if p != {'Results': 'results.md'}]
  return config


def on_files(files, config):
  """Adds the pages that are made."""
  made = {
    'flags.md': flags_page(),
    'methods.md': methods_page(),
    'configs.md': configs_page(),
    'tutorial.md': tutorial_page(),
    'contributing.md': _of_repository('CONTRIBUTING.md'),
    'changelog.md': _of_repository('CHANGELOG.md'),
    **api_pages(),
    **notebook_files(),
  }
  for name, content in made.items():
    files.append(File.generated(config, name, content=content))
  return files


def on_post_build(config):
  """Says where the site is, since pages open from a folder."""
  print(f'Open {config.site_dir}/index.html, or run `make docs-serve` to search too.')


def _code(name: str) -> str:
  """Returns the source of a function, named by its module and its own name."""
  module, _, function = name.rpartition('.')
  source = inspect.getsource(getattr(importlib.import_module(module), function))
  return f'```python\n{source}```'


def on_page_markdown(markdown, page, config, files):
  """Puts pictures in place of <!-- picture: NAME -->, functions of <!-- code: NAME -->.

  <!-- families --> becomes the table of families.
  """
  if '<!-- families -->' in markdown:
    markdown = markdown.replace('<!-- families -->', families_table())
  markdown = re.sub(
    r'<!-- picture: (\w+) -->',
    lambda found: f'<div class="picture">{pictures.draw(found[1])}</div>',
    markdown,
  )
  return re.sub(r'<!-- code: ([\w.]+) -->', lambda found: _code(found[1]), markdown)
