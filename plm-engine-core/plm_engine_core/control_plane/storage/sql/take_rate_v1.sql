-- Takes one token from a bucket that refills at p_rate per second up to p_burst.
-- Answers whether there was one, and in how many milliseconds there will be.
CREATE FUNCTION engine_take_rate_v1(p_tenant uuid, p_dimension text, p_rate double precision, p_burst double precision)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tokens double precision;
    v_now    timestamptz;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    INSERT INTO rate_buckets (tenant_id, dimension, tokens) VALUES (p_tenant, p_dimension, p_burst) ON CONFLICT DO NOTHING;
    v_now := clock_timestamp();
    UPDATE rate_buckets SET
            tokens = LEAST(p_burst, tokens + p_rate * GREATEST(0, extract(epoch FROM v_now - updated_at))),
            updated_at = GREATEST(v_now, updated_at)
        WHERE tenant_id = p_tenant AND dimension = p_dimension RETURNING tokens INTO v_tokens;
    IF v_tokens >= 1 THEN
        UPDATE rate_buckets SET tokens = tokens - 1 WHERE tenant_id = p_tenant AND dimension = p_dimension;
        RETURN jsonb_build_object('allowed', true, 'retry_after_ms', 0);
    END IF;
    RETURN jsonb_build_object('allowed', false, 'retry_after_ms', ceil((1 - v_tokens) / p_rate * 1000)::bigint);
END
$$;
