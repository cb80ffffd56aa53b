-- Keeps a lease: one statement, so that a holder that is paused keeps the run's row from nobody.
-- Answers {"cancel_requested", "halt"}, or null when somebody else holds the run or it has ended.
CREATE FUNCTION engine_renew_lease_v1(p_tenant uuid, p_run uuid, p_fencing bigint, p_seconds double precision)
RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_cancel boolean;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    UPDATE run_states SET lease_expires_at = clock_timestamp() + make_interval(secs => p_seconds)
        WHERE tenant_id = p_tenant AND run_id = p_run AND fencing_token = p_fencing AND state = 'running'
        RETURNING cancel_requested_at IS NOT NULL INTO v_cancel;
    IF NOT FOUND THEN
        RETURN NULL;
    END IF;
    RETURN jsonb_build_object('cancel_requested', v_cancel, 'halt', engine_run_halt_v2(p_tenant, p_run, false));
END
$$;
