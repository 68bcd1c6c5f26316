-- Tokens that the targets change most: share of the summed KL(target || base) of a run, and mean KL per token.
SELECT run, any_value(token) AS token, token_id, count(*) AS times, avg(kl) AS mean_kl,
       sum(kl) / sum(sum(kl)) OVER (PARTITION BY run) AS share_of_kl,
       avg(token_target_logprob - token_base_logprob) AS mean_logprob_change,
       avg(direction_norm) AS mean_direction_norm
FROM targets GROUP BY run, token_id ORDER BY sum(kl) DESC, run, token_id LIMIT 50
