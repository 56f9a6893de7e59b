"""Shows the doctests of docstrings as code, for mkdocstrings."""

import re

import griffe

_DOCTEST = re.compile(r'(?m)(?:^>>> .*\n?(?:^(?!>>> ).+\n?)*)+')


class Doctests(griffe.Extension):
  """Puts a fence around each doctest of a docstring."""

  def on_instance(self, *, obj, **_):
    if obj.docstring:
      obj.docstring.value = _DOCTEST.sub(
        lambda found: f'\n```pycon\n{found[0].rstrip()}\n```\n', obj.docstring.value
      )
