"""What each Mixture-of-Experts family of transformers needs that is not here, for those that are not supported.

A line goes away with the file that adds its family: `tests/jax_moe_lora/models/test_every_family.py` walks all model
types of transformers, and asks for a file or a line.
"""

from collections.abc import Mapping

_INDEXER = "an indexer that picks the tokens which attention sees"
_MAMBA = "Mamba layers"
_ENCODER_DECODER = "an encoder beside the decoder, and experts with a capacity"
_VISION = "no decoder: it sees images"

LACKS: Mapping[str, str] = {
    "aria_text": "published experts whose matrices are stored as [in, out] under fc1 and fc2",
    "axk1": "a norm of what comes out of the experts of some layers",
    "axk2": f"{_INDEXER}, and norms of low rank with gates",
    "bailing_hybrid": "linear attention with a decay for each channel (KDA)",
    "beam": "residuals that are scaled by their depth, and queries that are scaled by their position",
    "cohere2_moe": "attention and MLP side by side behind one norm",
    "dbrx": "one projection for q, k and v, and experts that are flat matrices",
    "deepseek_ocr2_text": "the text part of an OCR model, whose MoE is that of DeepSeek-V2 behind plain attention",
    "deepseek_v32": _INDEXER,
    "deepseek_v4": "attention to compressed keys and values, several residual streams, and routing by token id",
    "diffusion_gemma_text": "decoding of whole blocks by diffusion",
    "doge": "experts that are rows of an embedding, found by product keys",
    "dots3_note_text": f"{_INDEXER}, and latent attention of several widths",
    "dots3_note_vision_encoder": _VISION,
    "ernie4_5_vl_moe_text": "two sets of experts, one for text and one for images",
    "flint": "a sigmoid router without a bias beside windows, attention sinks and layers without positions",
    "glm4v_moe_text": "positions of three axes, and the prefixes of a wrapper's checkpoint",
    "glm5_next_text": f"{_INDEXER}, linear attention (KDA), and several residual streams",
    "glm_moe_dsa": _INDEXER,
    "granitemoe_swa": "a base of the rotary embedding for each layer, beside attention sinks",
    "granitemoehybrid": _MAMBA,
    "hy_v3": "checkpoints whose router and shared expert have other names",
    "hy_v4": f"{_INDEXER}, and several residual streams",
    "hy_v4_vl_text": f"{_INDEXER}, and several residual streams",
    "inkling2_loop_text": "relative positions, convolutions, and layers that run several times",
    "inkling2_text": "relative positions, convolutions, and attention to the residuals of earlier blocks",
    "inkling_text": "relative positions, convolutions, and shared experts that the router weighs",
    "jamba": _MAMBA,
    "jetmoe": "attention whose heads are experts",
    "kimi_linear": "linear attention with a decay for each channel (KDA)",
    "kolibri1": "a router that chooses by scores and weighs by their sigmoid, and four norms a layer",
    "laguna": "another number of heads in each layer, and output gates by softplus",
    "lara_mini": "gated delta-net layers beside layers with windows and layers without positions",
    "lfm2_moe": "layers that are short convolutions",
    "llama4_text": "experts whose inputs are weighted, not their outputs, and attention within chunks",
    "longcat_flash": "two attentions a layer with a shortcut to the experts, and experts that do nothing",
    "mellum": "parameters of the rotary embedding by the type of a layer",
    "mimo_v2_flash": "other numbers of key/value heads by the type of a layer, and values of another width than keys",
    "minimax": "lightning attention, which is linear",
    "minimax_m3_vl_text": "an indexer that picks the blocks of tokens which attention sees",
    "mistral_large4_text": f"{_INDEXER}, and keys and values that layers share",
    "muse_spark_text": "experts behind projections to another width, and residuals with learned gates",
    "nemotron_h": f"{_MAMBA}, and experts without gates",
    "nllb-moe": _ENCODER_DECODER,
    "openai_privacy_filter": "attention in both directions: it labels tokens and generates none",
    "qwen3_omni_moe_talker_text": "a model of speech that is driven by the states of another one",
    "qwen3_omni_moe_text": "a wrapper within a wrapper, of which the text part is Qwen3-MoE's",
    "qwen4_exp_text": f"{_INDEXER}, several residual streams, and embeddings of n-grams",
    "sarvam_mla": "a file for its config, whose model is that of DeepSeek-V3",
    "step3p5": "another number of heads in each layer, and experts that are clamped behind their activation",
    "switch_transformers": _ENCODER_DECODER,
    "unlimited_ocr_text": "a window that always sees the prompt too",
    "vitpose": _VISION,
    "vitpose_backbone": _VISION,
    "zaya": "attention behind convolutions, and a router whose state goes from layer to layer",
}
"""`model_type` -> what it needs, which follows "it needs"."""
