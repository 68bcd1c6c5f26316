-- Style share of KL(signal || base), by round: for the target, the direction, the OPSD gap and the correct pool.
SELECT run, round, signal,
       sum(kl * tokens) / sum(tokens) AS kl,
       sum(style * tokens) / sum(tokens) AS style_kl,
       sum(style * tokens) / sum(kl * tokens) AS style_share,
       sum(norm * tokens) / sum(tokens) AS norm,
       max_by(position_from || '-' || position_to, kl) AS most_at
FROM main.style GROUP BY run, round, signal ORDER BY run, round, signal
