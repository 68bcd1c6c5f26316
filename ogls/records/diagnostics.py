"""Arrow schemas of the diagnostic tables: style, health and sweeps."""

from __future__ import annotations

import pyarrow as pa

from ogls.records.schema import Table, column, columns

_RECIPE = column("recipe", pa.string(), "Name of the recipe.")
_STRENGTH = column("strength", pa.float64(), "Strength of the recipe; null for a recipe without one.", nullable=True)
_TOKEN_CLASS = column("token_class", pa.string(), "Class of the sampled token: a name of style.classes, or rest.")
_GROUP_AUC = (
    column(
        "group_auc",
        pa.float64(),
        "auc over pairs of rollouts of the same group: the difficulty of problems plays no part.",
        nullable=True,
    ),
    column("group_auc_low", pa.float64(), "Lower end of its 95% interval (bootstrap over groups).", nullable=True),
    column("group_auc_high", pa.float64(), "Upper end of its 95% interval.", nullable=True),
)
SWEEPS = Table(
    "sweeps",
    "sweep",
    "One row per recipe and strength, measured on the cached states of a round (`ogls sweep`).",
    columns(
        _RECIPE,
        _STRENGTH,
        column("w_base", pa.float64(), "Weight of the pool base."),
        column("w_reference", pa.float64(), "Weight of the pool reference."),
        column("w_correct", pa.float64(), "Weight of the pool correct."),
        column("w_incorrect", pa.float64(), "Weight of the pool incorrect."),
        column("weights", pa.string(), "Weights of all pools, as a JSON object.", nullable=True),
        column("tokens", pa.int64(), "Tokens measured."),
        column("kl", pa.float64(), "Mean KL(target || base) in nats per token."),
        column("entropy", pa.float64(), "Mean entropy of the target in nats."),
        column(
            "moved_correct", pa.float64(), "Mean p_target - p_base of the tokens of correct rollouts.", nullable=True
        ),
        column("moved_failed", pa.float64(), "Mean p_target - p_base of the tokens of failed rollouts.", nullable=True),
        column(
            "auc", pa.float64(), "AUC of the mean log-prob ratio of a rollout: correct against failed.", nullable=True
        ),
        *_GROUP_AUC,
        column(
            "token_auc", pa.float64(), "AUC of the log-prob ratio of a token: correct against failed.", nullable=True
        ),
        column("projected_kl", pa.float64(), "Mean KL to the base with steer.project = substance.", nullable=True),
        column("projected_auc", pa.float64(), "auc with steer.project = substance.", nullable=True),
        column("projected_group_auc", pa.float64(), "group_auc with steer.project = substance.", nullable=True),
        column(
            "until_share", pa.float64(), "Share of the tokens that train.until = first_mistake distils.", nullable=True
        ),
        column("until_kl", pa.float64(), "Mean KL(target || base) of these tokens.", nullable=True),
    ),
)


SWEEP_POSITIONS = Table(
    "sweep_positions",
    "sweep",
    "One row per recipe, strength and bin of positions in the rollout.",
    columns(
        _RECIPE,
        _STRENGTH,
        column("position_from", pa.int32(), "First position of the bin."),
        column("position_to", pa.int32(), "Last position of the bin."),
        column("correct_tokens", pa.int32(), "Tokens of correct rollouts in the bin."),
        column("failed_tokens", pa.int32(), "Tokens of failed rollouts in the bin."),
        column("auc", pa.float64(), "AUC of the log-prob ratio of a token: correct against failed.", nullable=True),
        column("kl", pa.float64(), "Mean KL(target || base) in nats per token."),
    ),
    owner="sweeps",
)


SWEEP_AGREEMENT = Table(
    "sweep_agreement",
    "sweep",
    "One row per pair of recipes and strengths: the agreement of their targets.",
    columns(
        column("a", pa.string(), "The first recipe and its strength."),
        column("b", pa.string(), "The second recipe and its strength."),
        column("same_top", pa.float64(), "Share of tokens at which both targets have the same most likely token."),
        column("correlation", pa.float64(), "Correlation of their log-prob ratios.", nullable=True),
    ),
    owner="sweeps",
)


SWEEP_CLASSES = Table(
    "sweep_classes",
    "sweep",
    "One row per recipe, strength and class of the sampled token: where the target tells right from wrong.",
    columns(
        _RECIPE,
        _STRENGTH,
        _TOKEN_CLASS,
        column("tokens", pa.int64(), "Tokens of this class."),
        column("kl", pa.float64(), "Mean KL(target || base) at these tokens, nats."),
        column("substance_kl", pa.float64(), "The part of kl within the classes of style.classes, nats."),
        column(
            "auc",
            pa.float64(),
            "Probability that the mean log-prob ratio target / base over these tokens is higher in a correct rollout "
            "than in a failed one. Rollouts without such a token are left out.",
            nullable=True,
        ),
        *_GROUP_AUC,
        column("base_auc", pa.float64(), "The same for the mean log-prob under the base pool.", nullable=True),
    ),
    owner="sweeps",
)


STYLE = Table(
    "style",
    "style",
    "One row per signal, class of the sampled token and bin of positions: distance of the signal from the base pool.",
    columns(
        column(
            "signal", pa.string(), "target, direction (base + correct - incorrect), reference (the OPSD gap), correct."
        ),
        _TOKEN_CLASS,
        column("position_from", pa.int32(), "First position of the bin."),
        column("position_to", pa.int32(), "Last position of the bin."),
        column("tokens", pa.int64(), "Tokens measured."),
        column("kl", pa.float64(), "Mean KL(signal || base) in nats per token."),
        column("style", pa.float64(), "The part of kl that moves between classes or within the rest."),
        column("norm", pa.float64(), "Mean L2 norm of the centred difference of the logits."),
    ),
)


HEALTH = Table(
    "health",
    "health",
    "One row per health check and evaluated round.",
    columns(
        column("check", pa.string(), "Name of the check, as in [health]."),
        column("value", pa.float64(), "The measured value.", nullable=True),
        column("limit", pa.float64(), "The limit that the value is compared with.", nullable=True),
        column(
            "failed", pa.bool_(), "Whether the check failed; null if the value or the limit is null.", nullable=True
        ),
        column("action", pa.string(), "off, warn, stop or rollback."),
    ),
)
