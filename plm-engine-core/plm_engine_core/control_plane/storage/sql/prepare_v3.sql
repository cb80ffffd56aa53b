-- What a proposal's decision needs of the database, in one trip: for whom the run works, and a token of every rate bucket.
-- `p_buckets` is [{"dimension", "per_second", "burst"}], narrow to wide; `agent` is the bucket of the run's agent, or of
-- the run itself where it has none. Either every bucket gives a token or none does; then the answer says which one was
-- empty, and in how many milliseconds all will have one.
-- The commit is not awaited: a token that a crash forgets was taken lets one more proposal pass, and no book depends on it.
-- As version 2, without a bound of its own on waiting for locks: the transaction says how long.
CREATE FUNCTION engine_prepare_v3(p_tenant uuid, p_run uuid, p_buckets jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_run     run_states;
    v_bucket  record;
    v_taken   text[] := '{}';
    v_wait    bigint;
    v_longest bigint := 0;
    v_empty   text;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    PERFORM set_config('synchronous_commit', 'off', true);
    SELECT * INTO v_run FROM run_states WHERE tenant_id = p_tenant AND run_id = p_run;
    FOR v_bucket IN SELECT dimension, per_second, burst, CASE dimension WHEN 'agent'
                THEN COALESCE('agent/' || v_run.agent_id, 'run/' || p_run) ELSE dimension END AS name
            FROM jsonb_to_recordset(p_buckets) AS b (dimension text, per_second double precision, burst double precision)
    LOOP
        v_wait := engine_take_token_v2(p_tenant, v_bucket.name, v_bucket.per_second, v_bucket.burst);
        IF v_wait = 0 THEN
            v_taken := v_taken || v_bucket.name;
        ELSIF v_wait > v_longest THEN
            v_longest := v_wait;
            v_empty := v_bucket.dimension;
        END IF;
    END LOOP;
    IF v_longest > 0 AND v_taken <> '{}' THEN
        UPDATE rate_buckets SET tokens = tokens + 1 WHERE tenant_id = p_tenant AND dimension = ANY (v_taken);
    END IF;
    RETURN jsonb_build_object('allowed', v_longest = 0, 'retry_after_ms', v_longest, 'dimension', v_empty,
        'run', CASE WHEN v_run.run_id IS NOT NULL THEN jsonb_build_object('agent_id', v_run.agent_id,
            'run_group_id', v_run.run_group_id, 'user_id', v_run.user_id, 'team', v_run.team) END);
END
$$;
