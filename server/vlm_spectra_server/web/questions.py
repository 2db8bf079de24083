"""What can be asked: the bodies of requests. Fields have the toolkit's names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from vlm_spectra.analyses import BASELINES, METHODS, MODES

Name = Annotated[str, Field(max_length=300)]
Text = Annotated[str, Field(max_length=20_000)]
TokenText = Annotated[str, Field(max_length=200)]
Token = TokenText | Annotated[int, Field(ge=0, lt=2**31)]
Names = Name | Annotated[list[Name], Field(max_length=8)]
"""One image, or several in the order in which the prompt has them."""


class Select(BaseModel):
    """A model to be loaded."""

    model_config = ConfigDict(strict=True)
    name: Annotated[str, Field(min_length=1, max_length=300, description="spectra-tiny, or a name of the hub")]


class Question(BaseModel):
    """A task and its image."""

    model_config = ConfigDict(strict=True, title="Question")
    filename: Annotated[Names, Field(description="As upload answered, or an example's; several; none")] = ""
    task: Annotated[Text, Field(min_length=1, description="What the model is asked")]
    assistant_prefill: Annotated[Text, Field(description="Text that the answer begins with")] = ""
    model: Annotated[Name, Field(description="The model's name; the server's first where empty")] = ""
    stream: Annotated[bool, Field(description="Answer in lines of JSON: progress, then the result")] = False


class Predict(Question):
    """An answer."""

    max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 128


class Forward(Question):
    """The most probable next tokens at every position."""

    top_k: Annotated[int, Field(ge=1, le=50)] = 5


class Attention(Question):
    """What a token reads."""

    layer: Annotated[int | None, Field(description="None for all layers, packed", ge=0, le=10_000)] = None
    head: Annotated[int | Literal["mean", "max"] | None, Field(description="None for all heads, packed")] = None
    position: Annotated[int, Field(description="The reading token, negative from the end", ge=-(2**31), lt=2**31)] = -1


class Second(BaseModel):
    """A second prompt, to compare with."""

    model_config = ConfigDict(strict=True)
    filename: Names = ""
    task: Annotated[Text, Field(min_length=1)]
    assistant_prefill: Text = ""


class Attribution(Question):
    """Which parts of the image made a target."""

    method: Literal[*METHODS] = "direct_logit"
    target: Annotated[Token, Field(description="A token's text or id; empty for the model's own next token")] = ""
    against: Annotated[Token, Field(description="A second token: the difference of the two is explained")] = ""
    answer: Annotated[Text, Field(description="Text behind the prompt, to be explained whole instead of a token")] = ""
    position: Annotated[
        int | None, Field(description="The position that predicts the target; None for the last", ge=-(2**31), lt=2**31)
    ] = None
    steps: Annotated[int | None, Field(description="Of integrated_gradients; None for enough", ge=1, le=4096)] = None
    baseline: Annotated[
        Literal["", *BASELINES],
        Field(description="Where integrated_gradients begin, what occlusion covers with; mean where empty"),
    ] = ""
    window: Annotated[int | None, Field(description="Of occlusion: image tokens along one side", ge=1, le=256)] = None
    stride: Annotated[int | None, Field(description="Of occlusion: from one window to the next", ge=1, le=256)] = None
    corrupted: Annotated[Second | None, Field(description="Of attribution_patching: the prompt to compare with")] = None


class Lens(Question):
    """What each layer would answer."""

    top_k: Annotated[int, Field(ge=1, le=20)] = 5
    hook: Annotated[str, Field(max_length=100)] = "hook_resid_post"
    page: Annotated[bool, Field(description="Only the address of a page with the readings")] = False


class Patching(Question):
    """A sweep of activation patching: the question is the clean prompt."""

    corrupted: Second
    hook: Annotated[str, Field(max_length=100)] = "hook_resid_post"
    over: Literal["positions", "image", "text", "heads"] = "positions"
    mode: Literal[*MODES] = "denoising"
    target: TokenText = ""
