"""One sample as every phase knows it, from reading to tokens: its turns, its tools, and which of its answers are trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Message = dict[str, Any]
"""A turn as chat templates take it: `role` (system, user, assistant, tool), `content`, and where it has them `tool_calls`,
`tool_call_id`, `name`, `reasoning_content`, `thinking`."""


@dataclass(frozen=True)
class Sample:
    """Turns, of which an assistant's may be the last; or a bare `text`, which has none."""

    messages: Sequence[Message] = ()
    tools: Sequence[Mapping[str, Any]] = ()
    """Definitions of tools, as JSON schemas, for the chat template."""
    text: str | None = None
    untrained: frozenset[int] = frozenset()
    """Assistant turns, by index in `messages`, that the data mark as not to be trained on."""
    row: int = field(default=0, compare=False)
    """Of its source, from 0."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "messages", tuple(self.messages))
        object.__setattr__(self, "tools", tuple(self.tools))

    @classmethod
    def pair(cls, prompt: str, response: str | None = None, row: int = 0) -> Sample:
        """One user turn and, where given, its answer."""
        turns = [{"role": "user", "content": prompt}]
        if response is not None:
            turns.append({"role": "assistant", "content": response})
        return cls(turns, row=row)

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | Sample, row: int = 0) -> Sample:
        """A sample, the row that `as_row` wrote of one, or a prompt's text."""
        if isinstance(value, Sample):
            return value
        if isinstance(value, str):
            return cls.pair(value, row=row)
        if value.get("text") is not None:
            return cls(text=value["text"], row=row)
        if not value.get("messages"):
            return cls.pair(value["prompt"], value.get("response"), row)
        turns = [{key: item for key, item in turn.items() if key != "weight"} for turn in value["messages"]]
        skipped = frozenset(i for i, turn in enumerate(value["messages"]) if turn.get("weight") == 0)
        return cls(turns, value.get("tools") or (), untrained=skipped, row=row)

    def as_row(self) -> dict[str, Any]:
        """What a jsonl file holds of it: prompt and response where that is all."""
        if self.text is not None:
            return {"text": self.text}
        if self.plain:
            return {kind: turn["content"] for kind, turn in zip(("prompt", "response"), self.messages, strict=False)}
        turns = [{**turn, "weight": 0} if i in self.untrained else turn for i, turn in enumerate(self.messages)]
        return {"messages": turns} | ({"tools": list(self.tools)} if self.tools else {})

    @property
    def known_by(self) -> Any:
        """What fingerprints cover: `as_row`, and of a prompt alone its text."""
        return self.prompt if self.plain and not self.answered else self.as_row()

    @property
    def plain(self) -> bool:
        """One user turn, and perhaps its answer, in words alone."""
        roles = ["user", "assistant"][: len(self.messages)]
        return (
            [turn["role"] for turn in self.messages] == roles != []
            and all(set(turn) == {"role", "content"} for turn in self.messages)
            and not self.tools
            and not self.untrained
        )

    @property
    def answered(self) -> bool:
        """Whether its last turn is an assistant's."""
        return bool(self.messages) and self.messages[-1]["role"] == "assistant"

    @property
    def before(self) -> Sequence[Message]:
        """The turns before the last answer."""
        return self.messages[:-1] if self.answered else self.messages

    @property
    def response(self) -> str:
        """The text of the last answer; that of a bare text is all of it."""
        return self.text if self.text is not None else self.messages[-1].get("content") or "" if self.answered else ""

    @property
    def prompt(self) -> str:
        """What stands before the last answer, for people and for comparisons: a lone user turn as it is, else role by role."""
        if [turn["role"] for turn in self.before] == ["user"]:
            return str(self.before[0]["content"])
        return "\n".join(f"{turn['role']}: {turn.get('content') or turn.get('tool_calls') or ''}" for turn in self.before)

    def asked(self) -> Sample:
        """The sample without its last answer."""
        return Sample(self.before, self.tools, row=self.row)


def as_samples(values: Iterable[str | Mapping[str, Any] | Sample]) -> list[Sample]:
    """`Sample.of` each, numbered in order."""
    return [Sample.of(value, row) for row, value in enumerate(values)]


def as_rows(samples: Iterable[Sample]) -> list[dict[str, Any]]:
    """The rows of one file: pairs of prompt and response where all are, else conversations and bare texts."""
    listed = list(samples)
    pairs = all(sample.plain for sample in listed)
    return [sample.as_row() if pairs or not sample.plain else {"messages": list(sample.messages)} for sample in listed]
