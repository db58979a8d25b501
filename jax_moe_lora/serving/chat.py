"""Conversations with a model, one answer at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack

from jax_moe_lora.arguments import suggest_keywords
from jax_moe_lora.errors import InputError
from jax_moe_lora.files.messages import Message, is_chat
from jax_moe_lora.serving.answers import Generation
from jax_moe_lora.serving.generation import TextGeneration
from jax_moe_lora.serving.sampling_params import SamplingOptions, SamplingParams


@suggest_keywords
class Chat(TextGeneration):
    """What `Model` does with one conversation."""

    def chat(
        self,
        messages: Sequence[Message],
        adapter_name: str | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        sampling_params: SamplingParams | None = None,
        callback: Callable[[int, int, str], None] | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Generation:
        """Answers a conversation through the checkpoint's chat template.

        The conversation is the caller's: `messages += [answer.message, {"role": "user", "content": "..."}]` goes on.
        `generate` answers many at once, and mixes them with texts.

        Args:
          messages: the turns so far, `{"role", "content"}` each.
          adapter_name: None is the base model.
          tools: JSON schemas of functions that the model may call.
          chat_template_kwargs: further names that the template reads, such as `enable_thinking`.
          sampling_params: how to answer.
          callback: as in `generate`; its first argument is always 0.
          **options: as in `generate`.

        Returns:
          The answer; `answer.message` is its turn.

        Raises:
          InputError: the messages are not a conversation, or the template refuses them; or as `generate`.
          CheckpointError: the checkpoint has no chat template, or it cannot be read.
          AdapterNameError: an unknown adapter.
        """
        if not is_chat(messages) or isinstance(messages, Mapping):
            raise InputError('messages are not a conversation; expected a list of {"role": "user", "content": "..."}.')
        prompt = {"messages": messages, "tools": tools, "chat_template_kwargs": chat_template_kwargs}
        (answer,) = self.generate(
            [prompt], [adapter_name], sampling_params=sampling_params, callback=callback, **options
        )
        return answer
