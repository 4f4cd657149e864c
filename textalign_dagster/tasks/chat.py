"""Tasks whose prompts can be rendered by a chat template: the base policy's own, or one in a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Self

from pydantic import Field, PrivateAttr

from textalign_dagster.settings import SettingsError
from textalign_dagster.tasks.dataset import DatasetTask
from textalign_dagster.tasks.written import ChatTemplate, Writer


class ChatTask(DatasetTask):
    """A dataset task with an optional chat template."""

    chat_template: str | None = Field(
        None,
        description="`model` (the base policy's own chat template), or the path of a Jinja file; null: none.",
    )
    _template: ChatTemplate | None = PrivateAttr(None)

    def for_policy(self, folder: Callable[[], Path]) -> Self:
        if self.chat_template is None:
            return self
        from textalign_dagster.tasks.chat_template import template_file, template_of_model

        own = self.chat_template == "model"
        task = self.model_copy()
        task._template = template_of_model(folder()) if own else template_file(Path(self.chat_template))
        return task

    def chat_writer(self) -> Writer:
        """A writer that renders dialogues by the chat template.

        Raises:
            SettingsError: no policy was given (:meth:`for_policy`), or the template cannot be read.
        """
        from textalign_dagster.tasks.chat_template import templated

        if self._template is None:
            raise SettingsError("task.chat_template: no policy is known yet; call `for_policy` first")
        return templated(self._template)
