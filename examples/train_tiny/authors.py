"""Who wrote this sentence: scores, and the baseline that needs no neural network."""

from __future__ import annotations

from typing import Any

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score

from fastff.demo.data import Sentences


def score(found: list[int], want: list[int], authors: int) -> dict[str, Any]:
    """Accuracy with its standard error, macro F1, and the confusion matrix (true author, found author)."""
    accuracy = float(accuracy_score(want, found))
    labels = list(range(authors))
    return {
        "accuracy": accuracy,
        "accuracy_error": (accuracy * (1 - accuracy) / len(want)) ** 0.5,
        "macro_f1": float(f1_score(want, found, labels=labels, average="macro", zero_division=0.0)),
        "confusion": confusion_matrix(want, found, labels=labels).tolist(),
        "sentences": len(want),
    }


def bag_of_words(learn: Sentences, unseen: Sentences) -> list[int]:
    """Predictions of logistic regression on word counts weighted by rarity, trained on the same sentences."""
    words = TfidfVectorizer(sublinear_tf=True)
    model = LogisticRegression(C=10.0, max_iter=300)
    model.fit(words.fit_transform(learn.texts), learn.labels.numpy())
    found: list[int] = model.predict(words.transform(unseen.texts)).tolist()
    return found
