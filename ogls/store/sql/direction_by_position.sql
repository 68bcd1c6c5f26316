-- Norm of the direction, KL(target || base) and entropy of the base pool, by position in the rollout.
WITH places AS (
    SELECT run, position, count(*) AS tokens, sum(direction_norm) AS direction_norm, sum(kl) AS kl,
           sum(token_target_logprob) - sum(token_base_logprob) AS change, sum(base_entropy) AS entropy
    FROM targets GROUP BY run, position
),
binned AS (SELECT *, ceil((max(position) OVER (PARTITION BY run) + 1) / 16)::INT AS width FROM places)
SELECT run, position // width * width AS position_from, (position // width + 1) * width - 1 AS position_to,
       sum(tokens)::BIGINT AS tokens, sum(direction_norm) / sum(tokens) AS direction_norm, sum(kl) / sum(tokens) AS kl,
       sum(change) / sum(tokens) AS mean_logprob_change, sum(entropy) / sum(tokens) AS base_entropy
FROM binned GROUP BY run, position // width, width ORDER BY run, position_from
