-- The last act before a call leaves the host: one conditional update that uses the grant up.
-- Answers {"status": "begun"} or {"status": "refused", "reason", "message"}; a refusal changes nothing.
-- A grant is named by its attempt and its id, so that either index of the table leads to the one row.
-- As version 4, without a bound of its own on waiting for locks: the transaction says how long.
CREATE FUNCTION engine_begin_v5(
    p_tenant uuid, p_run uuid, p_step integer, p_attempt integer, p_grant uuid, p_fencing bigint, p_actor text
) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant uuid := engine_enter_v2(p_tenant);
    v_over   record;
    v_run    record;
    v_halt   jsonb;
    v_seq    bigint;
BEGIN
    -- With the locks of engine_lock_above_v3, in the statement before the one that relies on them.
    SELECT r.run_group_id, r.agent_id, s.capability, num_nulls(
            pg_advisory_xact_lock_shared(hashtextextended('policy', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/system', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/tenant/' || v_tenant, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/agent/' || v_tenant || '/' || r.agent_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run_group/' || r.run_group_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run/' || r.run_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/capability/' || v_tenant || '/' || s.capability, 0)))
        INTO v_over FROM run_states AS r
        LEFT JOIN run_steps AS s ON s.tenant_id = r.tenant_id AND s.run_id = r.run_id AND s.step_index = p_step
            AND s.attempt = p_attempt
        WHERE r.tenant_id = v_tenant AND r.run_id = p_run;
    SELECT fencing_token = p_fencing AND state = 'running' AND lease_expires_at > clock_timestamp() AS held, cancel_requested_at,
           EXISTS (SELECT FROM halts_system WHERE lifted_at IS NULL)
               OR EXISTS (SELECT FROM halts WHERE tenant_id = v_tenant AND lifted_at IS NULL) AS halts
        INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = p_run FOR UPDATE;
    IF v_run.held IS NOT TRUE THEN
        PERFORM engine_hold_run_v1(v_tenant, p_run, p_fencing, true);  -- says what is amiss
    END IF;
    IF v_run.halts THEN
        v_halt := engine_standing_halt_v2(v_tenant, p_run, v_over.run_group_id, v_over.agent_id, v_over.capability);
    END IF;
    IF v_halt IS NOT NULL THEN
        RETURN jsonb_build_object('status', 'refused') || (engine_halted_v2(v_halt) - 'outcome');
    END IF;
    IF v_run.cancel_requested_at IS NOT NULL THEN
        RETURN jsonb_build_object('status', 'refused', 'reason', 'cancel_requested', 'message', 'the run is being cancelled');
    END IF;
    WITH used AS (
        UPDATE grants SET state = 'begun', begun_at = clock_timestamp()
            WHERE tenant_id = v_tenant AND id = p_grant AND run_id = p_run AND step_index = p_step AND attempt = p_attempt
              AND state = 'issued' AND fencing_token = p_fencing AND expires_at > clock_timestamp()
            RETURNING begun_at)
    UPDATE run_steps SET state = 'running', started_at = used.begun_at FROM used
        WHERE tenant_id = v_tenant AND run_id = p_run AND step_index = p_step AND attempt = p_attempt;
    IF NOT FOUND THEN
        RETURN engine_unusable_v2(v_tenant, p_run, p_grant, p_fencing);
    END IF;
    v_seq := engine_append_event_v3(v_tenant, 'run/' || p_run, 'step_started', p_actor,
        jsonb_build_object('step', p_step, 'attempt', p_attempt, 'grant_id', p_grant));
    RETURN '{"status": "begun"}';
END
$$;
