-- Books one ask, as in ask_v1.sql, and says first, in the same transaction, what it escalates: a run would have failed, and a human
-- is asked instead. Nodes of the release before never say so, and their asks are booked as before.
CREATE OR REPLACE FUNCTION engine_ask_v1(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_run     run_states;
    v_step    run_steps;
    v_policy  text;
    v_halt    jsonb;
    v_verdict jsonb := c -> 'decision';
    v_state   text := 'denied';
    v_asked   bigint;
    v_answer  jsonb;
    v_event   jsonb;
BEGIN
    SELECT * INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id;  -- what it belongs to never changes
    PERFORM engine_lock_above_v3(v_tenant, v_run_id, v_run.run_group_id, v_run.agent_id, NULL);
    PERFORM 1 FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id FOR UPDATE;
    SELECT * INTO v_step FROM run_steps WHERE tenant_id = v_tenant AND run_id = v_run_id
        AND step_index = (c ->> 'step_index')::integer AND attempt = (c ->> 'attempt')::integer;
    IF FOUND THEN
        RETURN engine_asked_v1(c, v_step);
    END IF;
    v_run := engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, true);
    SELECT digest INTO v_policy FROM policy_activations WHERE role = 'active' ORDER BY number DESC LIMIT 1;
    IF v_policy <> c ->> 'policy_digest' THEN
        RETURN jsonb_build_object('status', 'policy_changed', 'message', format(
            'policy %s decided, and meanwhile policy %s was activated', left(c ->> 'policy_digest', 12), left(v_policy, 12)));
    END IF;
    v_halt := engine_standing_halt_v2(v_tenant, v_run_id, v_run.run_group_id, v_run.agent_id, NULL);
    IF v_halt IS NOT NULL THEN
        RETURN engine_halted_v2(v_halt) - '{outcome,halt}'::text[] || '{"status": "denied"}';
    ELSIF v_run.cancel_requested_at IS NOT NULL THEN
        RETURN '{"status": "denied", "reason": "cancel_requested", "rule": "cancel",
            "message": "the run is being cancelled", "unblock": "nothing: somebody cancelled the run"}';
    END IF;

    IF v_verdict ->> 'outcome' = 'ask' THEN
        SELECT count(*) INTO v_asked FROM approval_tickets
            WHERE tenant_id = v_tenant AND run_id = v_run_id AND capability = c ->> 'capability';
        IF v_asked < (c ->> 'most')::integer THEN
            v_state := 'awaiting_approval';
        ELSE
            v_verdict := c -> 'beyond';
        END IF;
    END IF;
    v_answer := jsonb_strip_nulls(jsonb_build_object('reason', v_verdict -> 'reason', 'message', v_verdict -> 'message',
        'rule', v_verdict -> 'rule', 'unblock', v_verdict -> 'unblock',
        'status', CASE v_state WHEN 'denied' THEN 'denied' ELSE 'pending' END,
        'ticket_id', CASE v_state WHEN 'denied' THEN NULL ELSE c #> '{ticket,id}' END));
    v_answer := v_answer || engine_write_attempt_v4(c || jsonb_build_object('decision', v_verdict), v_state, v_answer,
        '{"opens": true}');
    UPDATE run_states SET reason = v_verdict ->> 'reason'
        WHERE tenant_id = v_tenant AND run_id = v_run_id AND state = 'awaiting_approval';
    v_event := jsonb_build_object('step', c -> 'step_index', 'step_id', c -> 'step_id', 'attempt', c -> 'attempt',
        'capability', c -> 'capability', 'resource', c -> 'resource', 'digest', c -> 'digest',
        'policy_digest', c -> 'policy_digest', 'decision', v_verdict, 'answer', v_answer, 'ticket_kind', 'input',
        'question', c #> '{arguments,question}', 'schema', c #> '{arguments,schema}');
    IF v_state = 'awaiting_approval' AND v_verdict ? 'escalates' THEN
        PERFORM engine_append_event_v3(v_tenant, 'run/' || v_run_id, 'escalation_raised', c ->> 'actor',
            (v_verdict -> 'escalates') || jsonb_build_object('ticket_id', c #> '{ticket,id}'));
    END IF;
    PERFORM engine_append_event_v3(v_tenant, 'run/' || v_run_id,
        CASE v_state WHEN 'denied' THEN 'step_denied' ELSE 'approval_requested' END, c ->> 'actor', v_event);
    RETURN v_answer || '{"replayed": false}';
END
$$;
