-- Holds an admission to what its decision assumed: a token of every rate bucket, taken here. Where one is missing the whole
-- transaction is undone, so the proposal is as good as never made; the caller then asks engine_prepare_v2 and decides anew.
-- `p_answer` is that of the admission, which came first in the same transaction and bound it to the tenant: the tenant's
-- bucket is what all its runs wait for, so it is locked last of all. Buckets as in engine_prepare_v2, which opens them.
CREATE FUNCTION engine_as_assumed_v1(p_answer jsonb, p_tenant uuid, p_run uuid, p_buckets jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_bucket record;
BEGIN
    FOR v_bucket IN SELECT per_second, burst, CASE dimension WHEN 'agent'
                THEN COALESCE('agent/' || (SELECT agent_id FROM run_states WHERE tenant_id = p_tenant AND run_id = p_run),
                              'run/' || p_run) ELSE dimension END AS name
            FROM jsonb_to_recordset(p_buckets) AS b (dimension text, per_second double precision, burst double precision)
    LOOP
        UPDATE rate_buckets SET
                tokens = LEAST(v_bucket.burst, tokens
                    + v_bucket.per_second * GREATEST(0, extract(epoch FROM clock_timestamp() - updated_at))) - 1,
                updated_at = GREATEST(clock_timestamp(), updated_at)
            WHERE tenant_id = p_tenant AND dimension = v_bucket.name AND LEAST(v_bucket.burst, tokens
                    + v_bucket.per_second * GREATEST(0, extract(epoch FROM clock_timestamp() - updated_at))) >= 1;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'PLA01', MESSAGE = format(
                'the rate bucket %s has no token', v_bucket.name);
        END IF;
    END LOOP;
    RETURN p_answer;
END
$$;
