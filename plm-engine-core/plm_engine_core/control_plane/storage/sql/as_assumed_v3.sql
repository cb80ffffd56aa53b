-- Holds an admission to what its decision assumed: a token of every rate bucket, taken here. Where one is missing the whole
-- transaction is undone, so the proposal is as good as never made; the caller then asks engine_prepare_v3 and decides anew.
-- `p_answer` is that of the admission, which came first in the same transaction and bound it to the tenant: the tenant's
-- bucket is what all its runs wait for, so it is locked last of all. Buckets as in engine_prepare_v3, which opens them.
-- As version 2, without a bound of its own on waiting for locks: the transaction says how long.
CREATE FUNCTION engine_as_assumed_v3(p_answer jsonb, p_tenant uuid, p_run uuid, p_buckets jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_name  text;
    v_rate  double precision;
    v_burst double precision;
BEGIN
    FOR v_each IN 0 .. jsonb_array_length(p_buckets) - 1 LOOP
        v_name := p_buckets -> v_each ->> 'dimension';
        v_rate := p_buckets -> v_each ->> 'per_second';
        v_burst := p_buckets -> v_each ->> 'burst';
        IF v_name = 'agent' THEN
            v_name := COALESCE('agent/' || (SELECT agent_id FROM run_states WHERE tenant_id = p_tenant AND run_id = p_run),
                               'run/' || p_run);
        END IF;
        UPDATE rate_buckets SET
                tokens = LEAST(v_burst, tokens
                    + v_rate * GREATEST(0, extract(epoch FROM clock_timestamp() - updated_at))) - 1,
                updated_at = GREATEST(clock_timestamp(), updated_at)
            WHERE tenant_id = p_tenant AND dimension = v_name AND LEAST(v_burst, tokens
                    + v_rate * GREATEST(0, extract(epoch FROM clock_timestamp() - updated_at))) >= 1;
        IF NOT FOUND THEN
            RAISE EXCEPTION USING ERRCODE = 'PLA01', MESSAGE = format('the rate bucket %s has no token', v_name);
        END IF;
    END LOOP;
    RETURN p_answer;
END
$$;
