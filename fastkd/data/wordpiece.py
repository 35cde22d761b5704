"""A WordPiece tokenizer of one's own, trained in a second: for tasks without a pretrained model."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_SPECIAL = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def train_wordpiece(
    texts: Iterable[str], vocab_size: int = 8000, *, lowercase: bool = True, max_length: int = 512
) -> PreTrainedTokenizerFast:
    """BERT's tokenizer (Devlin et al., 2019) with a vocabulary of about `vocab_size` pieces learned from `texts`.

    It adds [CLS] and [SEP], gives the second text of a pair type 1, and saves and loads like any fast tokenizer. The
    same texts give the same ids in every process. Every character of `texts` gets a piece, and so does every one
    inside a word; fewer pieces than `vocab_size` come out when the texts hold no more.

    Raises:
        ValueError: the characters alone fill `vocab_size`, or `texts` holds no text.
    """
    texts = list(texts)
    normalizer, splitter = normalizers.BertNormalizer(lowercase=lowercase), pre_tokenizers.BertPreTokenizer()
    words = {word for text in texts for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))}
    if not words:
        raise ValueError("there is no text to learn a vocabulary from")
    characters = sorted(set().union(*words))
    # The trainer numbers the pieces inside words in the random order of a hash table, and breaks ties by these numbers:
    # given first, like special tokens, they are the same every time.
    inside = [f"##{character}" for character in sorted(set().union(*(word[1:] for word in words)))]
    if vocab_size < (least := len(_SPECIAL) + len(characters) + len(inside)):
        raise ValueError(f"vocab_size={vocab_size} is too small: special tokens and characters alone are {least}")
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer, learner.pre_tokenizer = normalizer, splitter
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*_SPECIAL.values(), *inside],
        limit_alphabet=len(characters) + len(inside),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)

    tokenizer = Tokenizer(models.WordPiece(vocab=learner.get_vocab(), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, splitter, decoders.WordPiece()
    vocabulary = tokenizer.get_vocab()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **_SPECIAL,
    )
