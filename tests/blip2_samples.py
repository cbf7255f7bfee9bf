"""Tiny BLIP-2 parts that tests of several rooms share."""

import torch
from model_samples import CLS, DEC, ENC, PAD, SEP

from blip_pipelines.models.qformer import QFormer, QFormerConfig
from blip_pipelines.models.text import TextConfig


def tiny_qformer_config(*, queries: int = 4, every: int = 2, image_width: int = 24, **text: float) -> QFormerConfig:
    ids = {"pad_id": PAD, "cls_id": CLS, "sep_id": SEP, "dec_id": DEC, "enc_id": ENC}
    sizes = {"vocabulary": 40, "width": 16, "layers": 3, "heads": 2, "ffn_width": 24, "max_positions": 12}
    return QFormerConfig(
        text=TextConfig(**{**sizes, **ids, **text}),
        queries=queries,
        cross_attention_every=every,
        image_width=image_width,
        projection=8,
        initializer="fan_in",
    )


def tiny_qformer(seed: int = 0, **config) -> QFormer:
    return QFormer(tiny_qformer_config(**config), seed).eval()


def tiny_image(batch: int = 3, tokens: int = 5, width: int = 24, seed: int = 0) -> torch.Tensor:
    """What a frozen encoder gives."""
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def stock_blip2_config(config: QFormerConfig, **parts):
    """The stock configuration written out by hand, as an oracle that does not go through our export."""
    from transformers import Blip2Config

    text = config.text
    return Blip2Config(
        vision_config={
            "hidden_size": config.image_width,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 4,
            "layer_norm_eps": config.image_norm_eps,
            "initializer_range": 0.1,
        },
        qformer_config={
            "vocab_size": text.vocabulary,
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "num_attention_heads": text.heads,
            "intermediate_size": text.ffn_width,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "max_position_embeddings": text.max_positions,
            "cross_attention_frequency": config.cross_attention_every,
            "use_qformer_text_input": True,
            "layer_norm_eps": text.layer_norm_eps,
        },
        num_query_tokens=config.queries,
        image_text_hidden_size=config.projection,
        **parts,
    )


def vit_folder(folder, *, size: int = 8, layers: int = 2, width: int = 24):
    """A tiny stock ViT with its image processor."""
    from transformers import ViTConfig, ViTImageProcessorPil, ViTModel

    torch.manual_seed(0)
    model = ViTModel(
        ViTConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=size,
            patch_size=4,
            layer_norm_eps=1e-6,
            initializer_range=0.2,
        )
    ).eval()
    with torch.no_grad():  # a norm that leaves a trace
        model.layernorm.weight.uniform_(0.5, 1.5)
        model.layernorm.bias.normal_()
    model.save_pretrained(folder)
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=[0.4] * 3, image_std=[0.3] * 3)
    processor.save_pretrained(folder)
    return model


def tiny_uint8(batch: int = 3, size: int = 8, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, generator=generator)


SPOKEN = ["<pad>", "<s>", "</s>", "<unk>", "<user>", "<turn>", "a", "red", "crab", "picture", "of", "the", "house", ":"]
SPOKEN += ["what", "is", "this", "?", "it", "dog", "big", "small", "on", "and"]
CHAT = "{% for message in messages %}<user> {{ message['content'] }} <turn> {% endfor %}"


def spoken_tokenizer():
    """A tiny stock tokenizer of whole words, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(SPOKEN)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=CHAT, **names)


def language_stock(kind: str, seed: int = 0):
    """A tiny random stock language model; its table has two rows more than the tokenizer has words."""
    import transformers

    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": len(SPOKEN) + 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, **ids}
    if kind == "opt":
        config = transformers.OPTConfig(**sizes, ffn_dim=24, word_embed_proj_dim=16, max_position_embeddings=64)
        config.init_std = 0.3
        model = transformers.OPTForCausalLM(config)
    elif kind == "llama":
        config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, intermediate_size=24, initializer_range=0.3)
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.T5Config(
            **ids,
            d_model=16,
            d_kv=4,
            d_ff=24,
            num_layers=2,
            num_heads=4,
            decoder_start_token_id=0,
            initializer_factor=2.0,
        )
        model = transformers.T5ForConditionalGeneration(config)
    return model.eval()


def tiny_language(kind: str, seed: int = 0, **settings):
    from blip_pipelines.models.language import LanguageModel

    return LanguageModel(language_stock(kind, seed), spoken_tokenizer(), **settings)


def assert_equal_scores(former: QFormer, stock, pixels: torch.Tensor, image_BND: torch.Tensor, texts) -> None:
    """ITC and ITM of the same images and texts by a Q-Former and by the stock class."""
    ids, mask = texts
    with torch.no_grad():
        image = former.project_image(image_BND)
        image_BQE = former.image_features(former.encode_queries(image)[0])
        text_BE = former.text_features(ids, mask)
        similarity = torch.einsum("iqe,te->iqt", image_BQE, text_BE).amax(1)
        expected = stock(pixels, ids, mask.long()).logits_per_image
        torch.testing.assert_close(similarity, expected, atol=1e-5, rtol=0)
        matched = stock(pixels, ids, mask.long(), use_image_text_matching_head=True).logits_per_image
        torch.testing.assert_close(former.match_logits(ids, mask, image), matched, atol=1e-5, rtol=0)
