-- The contract is as before, but for a bucket whose time lies ahead, because a clock was set back meanwhile: who is refused
-- brings it back to now, so that it fills again from then on. What the clock's way back took is not given.
CREATE OR REPLACE FUNCTION engine_take_token_v2(
    p_tenant uuid, p_name text, p_rate double precision, p_burst double precision
) RETURNS bigint
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tokens double precision;
BEGIN
    FOR v_try IN 1..2 LOOP
        UPDATE rate_buckets SET
                tokens = LEAST(p_burst,
                    tokens + p_rate * GREATEST(0, extract(epoch FROM clock_timestamp() - updated_at))) - 1,
                updated_at = GREATEST(clock_timestamp(), updated_at)
            WHERE tenant_id = p_tenant AND dimension = p_name
            RETURNING tokens INTO v_tokens;
        EXIT WHEN FOUND;
        INSERT INTO rate_buckets (tenant_id, dimension, tokens) VALUES (p_tenant, p_name, p_burst) ON CONFLICT DO NOTHING;
    END LOOP;
    IF v_tokens >= 0 THEN
        RETURN 0;
    END IF;
    UPDATE rate_buckets SET tokens = tokens + 1, updated_at = LEAST(updated_at, clock_timestamp())
        WHERE tenant_id = p_tenant AND dimension = p_name;
    RETURN GREATEST(1, ceil(-v_tokens / p_rate * 1000)::bigint);
END
$$;
