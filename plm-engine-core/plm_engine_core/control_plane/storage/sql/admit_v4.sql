-- Books one decision: refuses, parks on a ticket, or reserves and grants. One call, one transaction.
-- Locks, always in this order: policy and halt scopes (shared), run, ticket or approval scope, budgets from narrow to wide,
-- grant, stream head. The run guards the idempotency records of its commands: they are read and written while it is held.
-- The command `c` is built by storage/commands; every key it reads is written there.
-- Each call of a function that pins its search_path has its cost, so what every admission does stands here;
-- what only some do is in the functions of halts_v2, tickets_v2 and budgets_v4.
CREATE FUNCTION engine_admit_v4(c jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER
SET search_path = pg_catalog, public, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_tenant  uuid := engine_enter_v2((c ->> 'tenant_id')::uuid);
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_run     record;
    v_above   record;
    v_record  record;
    v_halt    jsonb;
    v_verdict jsonb;
    v_state   text;
    v_answer  jsonb;
    v_seq     bigint;
BEGIN
    -- What a run belongs to never changes, so it may be read before the run is locked: with the locks of engine_lock_above_v3,
    -- in the statement before the one that relies on them.
    SELECT run_group_id AS group_id, agent_id, num_nulls(
            pg_advisory_xact_lock_shared(hashtextextended('policy', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/system', 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/tenant/' || v_tenant, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/agent/' || v_tenant || '/' || agent_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run_group/' || run_group_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/run/' || run_id, 0)),
            pg_advisory_xact_lock_shared(hashtextextended('halt/capability/' || v_tenant || '/' || (c ->> 'capability'), 0)))
        INTO v_above FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id;
    SELECT fencing_token = (c ->> 'fencing_token')::bigint AND state = 'running' AND lease_expires_at > clock_timestamp() AS held,
           EXISTS (SELECT FROM halts_system WHERE lifted_at IS NULL)
               OR EXISTS (SELECT FROM halts WHERE tenant_id = v_tenant AND lifted_at IS NULL) AS halts,
           (SELECT digest FROM policy_activations WHERE role = 'active' ORDER BY number DESC LIMIT 1) AS policy
        INTO v_run FROM run_states WHERE tenant_id = v_tenant AND run_id = v_run_id FOR UPDATE;

    SELECT digest, result INTO v_record FROM idempotency_records
        WHERE tenant_id = v_tenant AND operation = 'admit' AND command_id = c ->> 'command_id';
    IF FOUND THEN
        RETURN engine_recalled_v3(c, v_record.digest, v_record.result);
    END IF;
    IF v_run.held IS NOT TRUE THEN
        PERFORM engine_hold_run_v1(v_tenant, v_run_id, (c ->> 'fencing_token')::bigint, true);  -- says what is amiss
    END IF;
    IF v_run.policy <> c ->> 'policy_digest' THEN
        -- Nothing is written, not even this answer: the same command may come again, decided anew.
        RETURN jsonb_build_object('status', 'policy_changed', 'message', format(
            'policy %s decided, and meanwhile policy %s was activated',
            left(c ->> 'policy_digest', 12), left(v_run.policy, 12)));
    END IF;

    v_verdict := jsonb_build_object('outcome', c #> '{decision,outcome}', 'reason', c #> '{decision,reason}',
        'message', c #> '{decision,message}', 'rule', c #> '{decision,rule}', 'unblock', c #> '{decision,unblock}',
        'guidance', c #> '{decision,guidance}', 'retry_after_ms', c #> '{decision,retry_after_ms}');
    IF v_run.halts THEN
        v_halt := engine_standing_halt_v2(v_tenant, v_run_id, v_above.group_id, v_above.agent_id, c ->> 'capability');
    END IF;
    IF v_halt IS NOT NULL THEN
        v_verdict := v_verdict || engine_halted_v2(v_halt);
    ELSIF v_verdict ->> 'outcome' = 'ask' THEN
        v_verdict := v_verdict || engine_ticket_v2(c);
    END IF;
    IF v_verdict ->> 'outcome' = 'allow' THEN
        v_verdict := v_verdict || engine_reserve_v4(v_tenant, c -> 'reserve');
    END IF;

    v_state := CASE v_verdict ->> 'outcome' WHEN 'allow' THEN 'granted' WHEN 'ask' THEN 'awaiting_approval'
                                            WHEN 'steer' THEN 'steered' ELSE 'denied' END;
    IF v_state = 'awaiting_approval' AND v_verdict ->> 'ticket_id' IS NULL THEN
        v_verdict := v_verdict || jsonb_build_object('ticket_id', c #> '{ticket,id}', 'opens', true);
    END IF;
    v_answer := jsonb_strip_nulls(v_verdict - '{outcome,reserved,opens}'::text[]) || jsonb_build_object(
        'status', CASE v_state WHEN 'awaiting_approval' THEN 'pending' ELSE v_state END, 'replayed', false);
    v_answer := v_answer || engine_write_attempt_v4(c, v_state, v_answer, v_verdict);

    v_seq := engine_append_event_v3(v_tenant, 'run/' || v_run_id,
        CASE v_state WHEN 'awaiting_approval' THEN 'approval_requested' ELSE 'step_' || v_state END, c ->> 'actor',
        jsonb_strip_nulls(jsonb_build_object('step', c -> 'step_index', 'step_id', c -> 'step_id',
            'attempt', c -> 'attempt', 'capability', c -> 'capability', 'resource', c -> 'resource',
            'digest', c -> 'digest', 'policy_digest', c -> 'policy_digest', 'decision', c -> 'decision',
            'answer', v_answer - 'replayed', 'reserved', v_verdict -> 'reserved')));
    INSERT INTO idempotency_records (tenant_id, operation, command_id, digest, result)
        VALUES (v_tenant, 'admit', c ->> 'command_id', c ->> 'command_digest', v_answer);
    RETURN v_answer;
END
$$;

-- Writes the attempt as it now stands, with its grant and reservations or with its ticket, and answers what these add.
-- An attempt that waited for approval is decided once more, any other never again.
CREATE FUNCTION engine_write_attempt_v4(c jsonb, p_state text, p_answer jsonb, p_verdict jsonb) RETURNS jsonb
LANGUAGE plpgsql VOLATILE SECURITY INVOKER SET search_path = pg_catalog, public, pg_temp AS $$
DECLARE
    v_tenant  uuid := (c ->> 'tenant_id')::uuid;
    v_run_id  uuid := (c ->> 'run_id')::uuid;
    v_step    integer := (c ->> 'step_index')::integer;
    v_attempt integer := (c ->> 'attempt')::integer;
    v_grant   uuid := CASE WHEN p_state = 'granted' THEN (c #>> '{grant,id}')::uuid END;
    v_expires timestamptz;
BEGIN
    INSERT INTO run_steps (tenant_id, run_id, step_index, attempt, step_id, step_key, capability, resource,
            arguments, arguments_digest, executor_kind, state, decision, grant_id, ticket_id, error)
        VALUES (v_tenant, v_run_id, v_step, v_attempt, c ->> 'step_id', c ->> 'step_key', c ->> 'capability',
            c ->> 'resource', c -> 'arguments', c ->> 'digest', c ->> 'executor_kind', p_state, c -> 'decision', v_grant,
            (p_answer ->> 'ticket_id')::uuid, CASE WHEN p_state IN ('denied', 'steered') THEN p_answer END)
        ON CONFLICT (tenant_id, run_id, step_index, attempt) DO NOTHING;
    IF NOT FOUND THEN
        UPDATE run_steps SET state = p_state, decision = c -> 'decision', grant_id = v_grant,
                error = CASE WHEN p_state IN ('denied', 'steered') THEN p_answer END,
                ticket_id = COALESCE(ticket_id, (p_answer ->> 'ticket_id')::uuid), capability = c ->> 'capability',
                resource = c ->> 'resource', arguments = c -> 'arguments', arguments_digest = c ->> 'digest'
            WHERE tenant_id = v_tenant AND run_id = v_run_id AND step_index = v_step AND attempt = v_attempt
              AND state = 'awaiting_approval' AND step_id = c ->> 'step_id';
    END IF;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'PLS01', MESSAGE = format(
            'attempt %s of step %s of run %s was already decided', v_attempt, v_step, v_run_id);
    END IF;
    IF p_state = 'awaiting_approval' THEN
        RETURN engine_park_v3(c, p_answer, p_verdict);
    ELSIF v_grant IS NULL THEN
        RETURN '{}';
    END IF;

    v_expires := clock_timestamp() + make_interval(secs => (c #>> '{grant,seconds}')::double precision);
    INSERT INTO grants (tenant_id, id, run_id, step_index, attempt, digest, policy_digest, span_id, fencing_token,
            secret_hash, expires_at, reserved)
        VALUES (v_tenant, v_grant, v_run_id, v_step, v_attempt, c ->> 'digest', c ->> 'policy_digest',
            c #>> '{grant,span_id}', (c ->> 'fencing_token')::bigint, decode(c #>> '{grant,secret_hash}', 'hex'), v_expires,
            p_verdict -> 'reserved');
    IF p_verdict ?| ARRAY['ticket_id', 'approval_scope_id'] THEN
        PERFORM engine_use_approval_v2(v_tenant, p_verdict);
    END IF;
    RETURN jsonb_build_object('grant_id', v_grant, 'span_id', c #> '{grant,span_id}', 'expires_at', v_expires);
END
$$;
