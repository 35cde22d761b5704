"""The Japanese rows: a small encoder made for the purpose, and what coding its table does to its hidden states.

No pretrained Japanese model is at hand. The encoder is a BERT of 2 layers x 256, trained from nothing by masked
language modelling on the text, with a WordPiece tokenizer learned from the same text. It is read on the last 5 % of the
paragraphs, which neither of the two has seen.
"""

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, DataCollatorForLanguageModeling

from fastkd.data import chunk_corpus, load_corpus
from fastkd.data.wordpiece import train_wordpiece
from fastkd.embeddings import SparseCode, SparseEmbedding, count_tokens
from fastkd.recipes import FineTuneConfig, FineTuneTrainer
from fastkd.recipes.run_folder import is_done, train_and_save

_HELD_OUT, _LONGEST, _MASKED = 0.05, 128, 0.15


@dataclass(frozen=True)
class JapaneseEncoder:
    """A masked language model, its tokenizer, counts over the text it learned from, and paragraphs unseen."""

    model: BertForMaskedLM
    tokenizer: object
    counts: Tensor
    unseen: list[str]

    @property
    def table(self) -> Tensor:
        """(V, D)."""
        return self.model.get_input_embeddings().weight.detach()

    def with_code(self, code: SparseCode) -> BertForMaskedLM:
        """A copy that looks up in `code`; its output layer, tied to the table in training, stays dense."""
        coded = copy.deepcopy(self.model)
        coded.set_input_embeddings(SparseEmbedding(code, padding_idx=self.tokenizer.pad_token_id))
        return coded.eval()


def make_encoder(
    text: str | Path, folder: Path, *, steps: int, vocabulary: int = 8000, width: int = 256
) -> JapaneseEncoder:
    """Train tokenizer and model, or load them from `folder` if they are there."""
    paragraphs = load_corpus(text)["text"][:]
    seen = paragraphs[: round(len(paragraphs) * (1 - _HELD_OUT))]
    if not is_done(folder):
        # Lower case takes accents with it, and in Japanese these are the marks that tell が from か.
        tokenizer = train_wordpiece(seen, vocabulary, lowercase=False, max_length=_LONGEST)
        torch.manual_seed(0)
        model = BertForMaskedLM(
            BertConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=4 * width,
                max_position_embeddings=_LONGEST,
            )
        )
        trainer = FineTuneTrainer(
            model,
            FineTuneConfig(output_dir=str(folder), max_steps=steps, learning_rate=1e-3, seed=0, disable_tqdm=True),
            processing_class=tokenizer,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=_MASKED),
            train_dataset=chunk_corpus(Dataset.from_dict({"text": seen}), tokenizer, 64),
        )
        train_and_save(trainer, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    counts = count_tokens(Dataset.from_dict({"text": seen}), tokenizer, max_length=_LONGEST)
    model = BertForMaskedLM.from_pretrained(folder).eval()
    return JapaneseEncoder(model, tokenizer, counts, paragraphs[len(seen) :])


@torch.no_grad()
def compare(encoder: JapaneseEncoder, code: SparseCode) -> dict[str, float]:
    """Mean cosine between the last hidden states before and after, of all tokens of the unseen paragraphs and of those
    whose row is coded; accuracy at masked tokens before and after, the same ones; special tokens left out."""
    dense, coded = encoder.model, encoder.with_code(code)
    is_coded = code.arrays.slot.long() >= code.num_kept
    special = torch.tensor(encoder.tokenizer.all_special_ids)
    generator = torch.Generator().manual_seed(0)
    cosines, rare, right = [], [], {"before": [], "after": []}
    for paragraph in encoder.unseen:
        inputs = encoder.tokenizer(paragraph, truncation=True, max_length=_LONGEST, return_tensors="pt")
        ids = inputs["input_ids"]
        text = ~torch.isin(ids, special)
        states = [model(**inputs, output_hidden_states=True).hidden_states[-1][text] for model in (dense, coded)]
        cosines.append(torch.cosine_similarity(*states))
        rare.append(is_coded[ids[text]])
        masked = text & (torch.rand(ids.shape, generator=generator) < _MASKED)
        inputs["input_ids"] = ids.masked_fill(masked, encoder.tokenizer.mask_token_id)
        for when, model in (("before", dense), ("after", coded)):
            right[when].append(model(**inputs).logits[masked].argmax(1) == ids[masked])
    cosine, rare = torch.cat(cosines), torch.cat(rare)
    return {
        "cosine": float(cosine.mean()),
        "cosine_of_coded_tokens": float(cosine[rare].mean()),
        "rare_share": float(rare.float().mean()),
        "masked_accuracy_before": float(torch.cat(right["before"]).float().mean()),
        "masked_accuracy_after": float(torch.cat(right["after"]).float().mean()),
    }
