-- The last act before a call leaves the host: one conditional update that uses the grant up.
-- Answers {"status": "begun"} or {"status": "refused", "reason", "message"}; a refusal changes nothing.
CREATE FUNCTION engine_begin_v2(p_tenant uuid, p_run uuid, p_grant uuid, p_fencing bigint, p_actor text) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_over  record;
    v_halt  jsonb;
    v_run   run_states;
    v_grant grants;
BEGIN
    PERFORM engine_enter_v1(p_tenant);
    SELECT r.run_group_id, r.agent_id, s.capability INTO v_over FROM run_states AS r
        LEFT JOIN grants AS g ON g.tenant_id = r.tenant_id AND g.id = p_grant AND g.run_id = r.run_id
        LEFT JOIN run_steps AS s ON s.tenant_id = g.tenant_id AND s.run_id = g.run_id
            AND s.step_index = g.step_index AND s.attempt = g.attempt
        WHERE r.tenant_id = p_tenant AND r.run_id = p_run;
    PERFORM engine_lock_halts_v2(p_tenant, p_run, v_over.run_group_id, v_over.agent_id, v_over.capability);
    v_halt := engine_standing_halt_v2(p_tenant, p_run, v_over.run_group_id, v_over.agent_id, v_over.capability);
    v_run := engine_hold_run_v1(p_tenant, p_run, p_fencing, true);
    IF v_halt IS NOT NULL THEN
        RETURN jsonb_build_object('status', 'refused') || (engine_halted_v2(v_halt) - 'outcome');
    END IF;
    IF v_run.cancel_requested_at IS NOT NULL THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'cancel_requested', 'message', 'the run is being cancelled');
    END IF;
    UPDATE grants SET state = 'begun', begun_at = clock_timestamp()
        WHERE tenant_id = p_tenant AND id = p_grant AND run_id = p_run AND state = 'issued'
          AND fencing_token = p_fencing AND expires_at > clock_timestamp()
        RETURNING * INTO v_grant;
    IF NOT FOUND THEN
        RETURN engine_unusable_v2(p_tenant, p_run, p_grant, p_fencing);
    END IF;
    UPDATE run_steps SET state = 'running', started_at = v_grant.begun_at
        WHERE tenant_id = p_tenant AND run_id = p_run AND step_index = v_grant.step_index AND attempt = v_grant.attempt;
    PERFORM engine_append_event_v1(p_tenant, 'run/' || p_run, 'step_started', p_actor, jsonb_build_object(
        'step', v_grant.step_index, 'attempt', v_grant.attempt, 'grant_id', p_grant));
    RETURN jsonb_build_object('status', 'begun');
END
$$;

-- Why a grant cannot begin.
CREATE FUNCTION engine_unusable_v2(p_tenant uuid, p_run uuid, p_grant uuid, p_fencing bigint) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_grant grants;
BEGIN
    SELECT * INTO v_grant FROM grants WHERE tenant_id = p_tenant AND id = p_grant AND run_id = p_run;
    IF v_grant.id IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'PLN01', MESSAGE = 'not found', TABLE = 'grant', DETAIL = p_grant;
    ELSIF v_grant.fencing_token <> p_fencing THEN
        RAISE EXCEPTION USING ERRCODE = 'PLF01', MESSAGE = format(
            'grant %s belongs to an earlier holder of the lease of run %s', p_grant, p_run);
    ELSIF v_grant.state = 'revoked' THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'halted',
            'message', format('grant %s was revoked by a halt; its call has to be admitted anew', p_grant));
    ELSIF v_grant.state <> 'issued' THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'grant_used',
            'message', format('grant %s is %s; a grant is used once', p_grant, v_grant.state));
    END IF;
    RETURN jsonb_build_object('status', 'refused', 'reason', 'grant_expired',
        'message', format('grant %s expired at %s before its call could start', p_grant, v_grant.expires_at));
END
$$;
