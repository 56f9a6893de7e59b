"""HTML and SVG in which text is escaped unless it is marked as markup."""

import html

_KEPT = '\n\t\u200d'  # the last one joins the parts of an emoji


class Markup(str):
  """Text that already is HTML; all other text is escaped."""


def clean(text: object) -> str:
  """Replaces what a page cannot hold and what turns its direction."""
  return ''.join(c if c.isprintable() or c in _KEPT else '\ufffd' for c in str(text))


def escape(content: object) -> Markup:
  """Escapes anything but markup."""
  if isinstance(content, Markup):
    return content
  return Markup(html.escape(clean(content)))


def join(parts) -> Markup:
  """Joins parts, escaping those that are not markup."""
  return Markup(''.join(map(escape, parts)))


def tag(name: str, *content: object, **attributes: object) -> Markup:
  """Returns an element; `class_` is class, and _ in a name is -."""
  words = [name]
  for key, value in attributes.items():
    words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(value)}"')
  return Markup(f'<{" ".join(words)}>{join(content)}</{name}>')
