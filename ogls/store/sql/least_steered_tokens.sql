-- Tokens that the targets change least: lowest mean KL(target || base) of tokens with 20 or more occurrences.
SELECT run, any_value(token) AS token, token_id, count(*) AS times, avg(kl) AS mean_kl,
       avg(token_target_logprob - token_base_logprob) AS mean_logprob_change,
       avg(direction_norm) AS mean_direction_norm
FROM targets GROUP BY run, token_id HAVING count(*) >= 20 ORDER BY mean_kl, run, token_id LIMIT 50
