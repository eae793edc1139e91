"""What every layout answers."""

from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmtrain.model.config import MPTConfig

if TYPE_CHECKING:
    from llmtrain.checkpoint.weights import Weights

LayoutName = Literal["mpt", "llama", "mistral", "code"]


class Layout(Protocol):
    """One way to write a model as a Hugging Face folder."""

    @property
    def name(self) -> LayoutName:
        """Its short name."""
        ...

    @property
    def architecture(self) -> str:
        """The class that opens it, as config.json names it: ``MptForCausalLM``, ``LlamaForCausalLM``, ..."""
        ...

    @property
    def reason(self) -> str | None:
        """Why the model is not written as plain MPT, in one or two sentences for users; None when it is."""
        ...

    @property
    def blocks(self) -> str:
        """Where the class keeps its list of blocks, such as ``transformer.blocks``."""
        ...

    @property
    def needs_trust_remote_code(self) -> bool:
        """Whether the folder opens only with ``trust_remote_code=True``."""
        ...

    def config_json(self, config: MPTConfig, dtype: str, token_ids: dict[str, int | None]) -> dict[str, Any]:
        """The content of config.json.

        Args:
            config: The one that the layout was chosen for.
            dtype: Of the weights, such as ``float32``.
            token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` where they are known.
        """
        ...

    def weights(self, config: MPTConfig, weights: "Weights") -> "Weights":
        """The weights by the class's names, renamed and split as they are read: nothing is read here.

        A tied head is not among them: transformers ties it again by itself.
        """
        ...

    def files(self) -> dict[str, str]:
        """Further text files of the folder: name -> content."""
        ...
