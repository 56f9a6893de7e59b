"""How an example is written for a model: with names, plainly, as Alpaca, by a template.

A template is foreign code, so it runs in Jinja's sandbox, with what transformers
gives it. What bears the loss is told by rendering a conversation up to there.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from hetlora_jax import files
from hetlora_jax.config import ConfigError

USER, CLIENT, SYSTEM = 'user', 'assistant', 'system'  # roles, as templates call them


class Chat(NamedTuple):
  """A conversation, whose last turn the client wrote."""

  turns: Sequence[tuple[str, str]]  # (role, text), oldest first
  bears_from: int | None = None  # from which turn the client's bear the loss; the last
  cue: str = ''  # a line such as 'Subject:', after a text that is to be summed up

  @property
  def bearing(self) -> list[int]:
    """The turns that bear the loss; those that open the conversation answer nobody."""
    if self.bears_from is None:
      return [len(self.turns) - 1]
    mine = [role == CLIENT for role, _ in self.turns]
    chosen = range(self.bears_from, len(mine))
    return [i for i in chosen if mine[i] and not all(mine[:i])]


class Rendered(NamedTuple):
  """A prompt and its completion, which bears the loss.

  Where the prompt must be cut to fit, it loses its start; or, if it has a cue,
  which ends it, what is right before the cue.
  """

  prompt: str  # without the cue
  completion: str
  cue: str = ''
  earlier: tuple[tuple[str, str], ...] = ()  # prompts and completions before these
  special: bool = False  # whether special tokens are spelled out in it, bos too

  def losing_its_end(self, mark: str) -> Rendered:
    """Makes the last `mark` in the prompt, and what follows, its cue."""
    at = self.prompt.rindex(mark)
    return self._replace(prompt=self.prompt[:at], cue=self.prompt[at:])


class Format(NamedTuple):
  """A way to write, and the tokens that end a completion; None: a line's end."""

  render: Callable[[Chat], Rendered]
  ends: frozenset[int] | None = None


def _turn_by_turn(
  chat: Chat, spell: Callable[[int, str, str], tuple[str, str]]
) -> Rendered:
  """Puts turns behind each other, spelled as (what introduces one, the turn)."""
  pairs, prompt, bearing = [], '', chat.bearing
  for i, (role, text) in enumerate(chat.turns):
    head, body = spell(i, role, text)
    if i in bearing:
      pairs.append((prompt + head, body))
      prompt = ''
    else:
      prompt += head + body
  *earlier, (prompt, completion) = pairs
  return Rendered(prompt, completion, earlier=tuple(earlier))


def with_names(chat: Chat) -> Rendered:
  """Renders a line a turn; A is the client, B everybody else."""

  def spell(i: int, role: str, text: str) -> tuple[str, str]:
    if role == SYSTEM:
      return '', f'{text}\n'
    return f'{"A" if role == CLIENT else "B"}:', f' {text}\n'

  written = _turn_by_turn(chat, spell)
  return written.losing_its_end('\nA:') if chat.cue else written


def as_data_set(chat: Chat) -> Rendered:
  """Renders a chat with names; a text that is summed up, its cue, and the summary."""
  if not chat.cue:
    return with_names(chat)
  *context, (_, target) = chat.turns
  text = ' '.join(text for _, text in context)
  return Rendered(text, f' {target}\n', f'\n{chat.cue}')


def _plain(chat: Chat, bos: str, eos: str) -> Rendered:
  """Puts turns on lines of their own; those of the client end the text."""

  def spell(i: int, role: str, text: str) -> tuple[str, str]:
    return '\n' if i else bos, text + (eos if role == CLIENT else '')

  written = _turn_by_turn(chat, spell)._replace(special=True)
  return written.losing_its_end('\n') if chat.cue else written


def _alpaca(chat: Chat, bos: str, eos: str) -> Rendered:
  """Renders the first text as the instruction, those after it as its input.

  Taori et al. (2023), github.com/tatsu-lab/stanford_alpaca, train.py.
  """
  if chat.bears_from is not None:
    _refuse('alpaca', 'it has one instruction and no conversation: take plain or chat')
  *context, (_, target) = chat.turns
  instruction, *inputs = (text for _, text in context)
  paired = ', paired with an input that provides further context' if inputs else ''
  given = f'### Input:\n{chr(10).join(inputs)}\n\n' if inputs else ''
  prompt = (
    f'{bos}Below is an instruction that describes a task{paired}. Write a response '
    'that appropriately completes the request.\n\n'
    f'### Instruction:\n{instruction}\n\n{given}### Response:'
  )
  written = Rendered(prompt, f'{target}{eos}', special=True)
  return written.losing_its_end('\n\n### Response:')


# --- The model's own template ----------------------------------------------


def _refuse(name: str, why: object) -> NoReturn:
  raise ConfigError(f'config.data.format={name!r} cannot render these data: {why}.')


# Templates write the date. A run that goes on tomorrow must see the same prompts, so
# it is always the one that Llama's template falls back to.
_TODAY = datetime.datetime(2024, 7, 26)


class _Generation(jinja2.ext.Extension):
  """Takes {% generation %}, by which templates mark what an assistant writes."""

  tags = {'generation'}  # noqa: RUF012  as Jinja declares it

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(('name:endgeneration',), drop_needle=True)
    return jinja2.nodes.Scope(body, lineno=line)


def _raise(message: str) -> NoReturn:
  raise jinja2.TemplateError(message)


def _to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
  return json.dumps(
    x,
    ensure_ascii=ensure_ascii,
    indent=indent,
    separators=separators,
    sort_keys=sort_keys,
  )


@functools.cache
def _sandbox() -> jinja2.Environment:
  """Returns what transformers 5 compiles templates with."""
  found = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  found.filters['tojson'] = _to_json
  found.globals['raise_exception'] = _raise
  found.globals['strftime_now'] = _TODAY.strftime
  return found


class Template:
  """A chat template, and the special tokens that it may name."""

  def __init__(self, text: str, tokens: dict[str, str]):
    """Compiles a template; raises ConfigError if it is none."""
    self._tokens = tokens
    try:
      self._template = _sandbox().from_string(text)
    except jinja2.TemplateError as error:
      _refuse('template', f"the model's chat template is damaged ({error})")
    self._user_first = False
    try:
      self.render(Chat([(CLIENT, 'a'), (USER, 'b'), (CLIENT, 'c')]))
    except ConfigError:
      self._user_first = True

  def text(self, messages: Sequence[dict[str, str]], prompt: bool = False) -> str:
    """Renders messages and, for a prompt, what introduces the assistant's next."""
    try:
      return self._template.render(
        messages=messages, add_generation_prompt=prompt, **self._tokens
      )
    except (jinja2.TemplateError, *files.UNEXPECTED) as error:
      roles = ', '.join(message['role'] for message in messages)
      _refuse(
        'template',
        f"the model's chat template says {files.short(str(error))!r} of a conversation "
        f"of {roles}: change the roles of your data, or take 'chat'",
      )

  def render(self, chat: Chat) -> Rendered:
    """Renders a conversation; the client is its assistant.

    One that the client begins gets an empty turn of a user first, where the template
    refuses it without.
    """
    merged, own = _merged(chat)
    bearing = merged.bearing
    messages = [{'role': role, 'content': text} for role, text in merged.turns]
    if merged.turns[0][0] == CLIENT and (self._user_first or bearing[0] == 0):
      messages = [{'role': USER, 'content': ''}, *messages]
      bearing = [i + 1 for i in bearing]
    whole, pairs, done = self.text(messages), [], 0
    for i in bearing:
      prompt = self.text(messages[:i], prompt=True) + own
      turn = whole if i == bearing[-1] else self.text(messages[: i + 1])
      if not whole.startswith(turn):  # Phi 3 writes it after all, if nothing is asked
        turn = turn.removesuffix(self._tokens.get('eos_token', ''))
      if not (turn.startswith(prompt) and whole.startswith(turn)):
        _refuse(
          'template',
          f"the model's chat template writes {prompt[-40:]!r} before a turn of the "
          'assistant otherwise once that is there, or more follows, so what bears loss '
          "cannot be told: take 'chat', or correct the template",
        )
      pairs.append((whole[done : len(prompt)], whole[len(prompt) : len(turn)]))
      done = len(turn)
    *earlier, (prompt, completion) = pairs
    written = Rendered(prompt, completion, earlier=tuple(earlier), special=True)
    return written.losing_its_end(f'\n{chat.cue}') if chat.cue else written


def _merged(chat: Chat) -> tuple[Chat, str]:
  """Merges turns of one role, as templates want roles to alternate.

  Also returns what of the last turn the client had written before the target.
  """
  *context, (_, target) = chat.turns
  if chat.cue:
    text = ' '.join(text for _, text in context)
    context = [(USER, f'{text}\n{chat.cue}')]
  whole, turns, bears_from = chat.bears_from is not None, [], chat.bears_from
  for i, (role, text) in enumerate(context):
    if i == chat.bears_from:
      bears_from = len(turns)
    if turns and turns[-1][0] == role:
      turns[-1] = role, f'{turns[-1][1]}\n{text}'
    else:
      turns.append((role, text))
  own = ''
  if turns[-1][0] == CLIENT:
    own = turns.pop()[1].lstrip() + '\n'
  if whole:  # the last turn bears the loss in any case
    bears_from = min(bears_from, len(turns))
  merged = chat._replace(turns=[*turns, (CLIENT, own + target)], bears_from=bears_from)
  return merged, '' if whole else own


def make(name: str | None, tokenizer: Any) -> Format:
  """Returns a format by its name in `config.data.format`.

  Args:
    name: the format; None: the data set's own.
    tokenizer: the model's; all but the data set's own and 'chat' need one that knows
      special tokens (models.tokenizer.Tokenizer).

  Raises:
    ConfigError: the tokenizer has no template, or knows no special tokens.
  """
  if name in (None, 'chat'):
    return Format(with_names if name else as_data_set)
  if not hasattr(tokenizer, 'encode_special'):
    raise ConfigError(
      f'config.data.format={name!r} needs a tokenizer with encode_special, bos_token and '
      "eos_token, which yours has not: add them, or take 'chat'."
    )
  bos, eos = tokenizer.bos_token, tokenizer.eos_token
  end = frozenset(tokenizer.encode_special(eos))
  if name != 'template':
    spell = {'plain': _plain, 'alpaca': _alpaca}[name]
    return Format(functools.partial(spell, bos=bos, eos=eos), end)
  check_template(tokenizer.chat_template)
  render = Template(
    tokenizer.chat_template, {'bos_token': bos, 'eos_token': eos}
  ).render
  # What follows an answer ends it, such as <end_of_turn>.
  answer = render(Chat([(USER, 'a'), (CLIENT, 'x')])).completion
  after = tokenizer.encode_special(answer.partition('x')[2])
  return Format(render, end | frozenset(after[:1]))


def check_template(template: str) -> None:
  """Raises ConfigError if there is no chat template."""
  if not template:
    raise ConfigError(
      "config.data.format='template' needs a model with a chat template, and "
      'config.model.source has none: models made for chats have one, such as '
      'smollm2_135m; or put a chat_template.jinja into its Hugging Face folder; or '
      "take 'chat'."
    )
